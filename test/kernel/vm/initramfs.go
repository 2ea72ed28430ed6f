package vm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// guestInit is the machine's first process. It writes what concerns the kernel to the first
// serial line, and runs the program on the second one.
const guestInit = `#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /run /tmp /var/lib /dev/pts /mnt
/bin/busybox mount -t tmpfs -o mode=755 tmpfs /run
/bin/busybox mount -t tmpfs tmpfs /tmp
/bin/busybox --install -s /bin
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
while read module; do insmod $module || echo "GUEST WARNING: insmod $module"; done < /modules
stty -F /dev/ttyS1 raw -echo
. /job >/dev/ttyS1 2>&1 </dev/null
poweroff -f
`

// An Environment is what a guest program finds in the machine.
type Environment struct {
	// Modules are loaded, with what they need, before the program is started.
	Modules []string
	// Programs of this machine are copied, with the libraries they need. Busybox is there in
	// any case; a program here is found before busybox's of the same name.
	Programs []string
}

// A Machine is a kernel and a root file system, ready to boot.
type Machine struct {
	Kernel    *Kernel
	initramfs string // path of the archive, uncompressed: the emulated processor unpacks slowly
}

// Prepare makes a machine, or takes the one that was made before from dir.
func Prepare(ctx context.Context, dir string, env Environment) (*Machine, error) {
	kernel, err := PrepareKernel(ctx, dir)
	if err != nil {
		return nil, err
	}
	modules, err := kernel.moduleFiles(env.Modules)
	if err != nil {
		return nil, err
	}
	files, err := programFiles(ctx, append([]string{"busybox"}, env.Programs...))
	if err != nil {
		return nil, err
	}
	key := sha256.New()
	fmt.Fprintln(key, guestInit, kernel.Release)
	for _, file := range slices.Concat(modules, files) {
		fi, err := os.Stat(file)
		if err != nil {
			return nil, err
		}
		fmt.Fprintln(key, file, fi.Size(), fi.ModTime().UnixNano())
	}
	m := &Machine{Kernel: kernel, initramfs: filepath.Join(dir, fmt.Sprintf("initramfs-%x.cpio", key.Sum(nil)[:8]))}
	if _, err := os.Stat(m.initramfs); !errors.Is(err, fs.ErrNotExist) {
		return m, err
	}
	// Those of other keys are out of date.
	old, err := filepath.Glob(filepath.Join(dir, "initramfs-*"))
	if err != nil {
		return nil, err
	}
	for _, path := range old {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return m, writeInitramfs(m.initramfs, modules, files)
}

func writeInitramfs(path string, modules, files []string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err == nil {
			err = os.Rename(f.Name(), path)
		} else {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	c := &cpioWriter{w: f}
	c.text("init", 0o755, guestInit)
	var list strings.Builder
	for _, module := range modules {
		name := "lib/modules/" + filepath.Base(module)
		fmt.Fprintln(&list, "/"+name)
		c.file(name, module)
	}
	c.text("modules", 0o644, list.String())
	c.symlink("etc/mtab", "/proc/mounts")
	for _, file := range files {
		name := strings.TrimPrefix(file, "/")
		if filepath.Base(file) == "busybox" {
			name = "bin/busybox"
		}
		c.file(name, file)
	}
	for _, name := range []string{"proc", "sys", "dev"} {
		c.parents(name + "/x")
	}
	return c.end()
}

// programFiles returns the paths of programs, and of the libraries they load.
func programFiles(ctx context.Context, programs []string) ([]string, error) {
	var files, missing []string
	add := func(path string) {
		if !slices.Contains(files, path) {
			files = append(files, path)
		}
	}
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err != nil {
			missing = append(missing, name)
			continue
		}
		add(path)
		// ldd exits with 1 for a static program.
		out, err := output(ctx, "", "ldd", path)
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			continue
		} else if err != nil {
			return nil, err
		}
		for _, word := range strings.Fields(out) {
			if strings.HasPrefix(word, "/") {
				add(word)
			}
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("not installed: %s (apt-get install busybox-static e2fsprogs xfsprogs util-linux mount fio nbd-client)", strings.Join(missing, ", "))
	}
	return files, nil
}
