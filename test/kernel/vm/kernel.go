package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// kernelPackage is the package that depends on the current kernel's package.
const kernelPackage = "linux-image-cloud-amd64"

// A Kernel is an unpacked kernel package.
type Kernel struct {
	Release string // as uname -r says it
	Image   string // path of the bzImage
	modules string // directory with modules.dep
}

// PrepareKernel downloads and unpacks Debian's current cloud kernel below dir, unless it is there.
func PrepareKernel(ctx context.Context, dir string) (*Kernel, error) {
	pkg, err := currentKernelPackage(ctx)
	if err != nil {
		// Without a package index, what was unpacked before will do.
		if old, _ := filepath.Glob(filepath.Join(dir, "linux-image-*")); len(old) > 0 {
			slices.Sort(old)
			return openKernel(old[len(old)-1])
		}
		return nil, err
	}
	root := filepath.Join(dir, pkg)
	if k, err := openKernel(root); !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(dir, "unpack-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	if _, err := output(ctx, work, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return nil, err
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return nil, fmt.Errorf("apt-get download %s left %d files, want 1", pkg, len(debs))
	}
	tree := filepath.Join(work, "root")
	if _, err := output(ctx, work, "dpkg", "-x", debs[0], tree); err != nil {
		return nil, err
	}
	k, err := openKernel(tree)
	if err != nil {
		return nil, err
	}
	// The package's own installation would do this.
	if _, err := output(ctx, work, "depmod", "-b", tree, k.Release); err != nil {
		return nil, err
	}
	if err := os.Rename(tree, root); err != nil {
		return nil, err
	}
	return openKernel(root)
}

// currentKernelPackage is the name of the newest kernel's package, with its version in it.
func currentKernelPackage(ctx context.Context) (string, error) {
	out, err := output(ctx, "", "apt-cache", "show", "--no-all-versions", kernelPackage)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if depends, ok := strings.CutPrefix(line, "Depends: "); ok {
			name, _, _ := strings.Cut(depends, " ")
			return strings.TrimSpace(name), nil
		}
	}
	return "", fmt.Errorf("package %s is unknown; run apt-get update", kernelPackage)
}

// openKernel looks at an unpacked package. Without one in root it returns fs.ErrNotExist.
func openKernel(root string) (*Kernel, error) {
	images, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("%d kernels in %s: %w", len(images), root, fs.ErrNotExist)
	}
	release := strings.TrimPrefix(filepath.Base(images[0]), "vmlinuz-")
	return &Kernel{Release: release, Image: images[0], modules: filepath.Join(root, "lib", "modules", release)}, nil
}

// moduleFiles returns the files of the named modules and of what they need, in the order in
// which they are to be loaded. A name that is built in has none.
func (k *Kernel) moduleFiles(names []string) ([]string, error) {
	dep, err := os.ReadFile(filepath.Join(k.modules, "modules.dep"))
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(k.modules, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	lines := make(map[string][]string) // module name: its file, and the files it needs
	for line := range strings.Lines(string(dep)) {
		file, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
		lines[strings.TrimSuffix(filepath.Base(file), ".ko")] = append([]string{file}, strings.Fields(needs)...)
	}
	var files []string
	for _, name := range names {
		line, ok := lines[name]
		if !ok && !bytes.Contains(builtin, []byte("/"+name+".ko")) {
			return nil, fmt.Errorf("kernel %s has no module %s", k.Release, name)
		}
		// A line names what is needed directly last but needed first.
		for _, file := range slices.Backward(line) {
			if path := filepath.Join(k.modules, file); !slices.Contains(files, path) {
				files = append(files, path)
			}
		}
	}
	return files, nil
}

// output runs a command and returns what it prints.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out), nil
}
