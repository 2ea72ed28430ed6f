package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/term"
)

// sizes are how much there is to do.
type sizes struct {
	warm    int64 // bytes of memory that are used before each line
	full    int64 // bytes of the image that is fully allocated
	fresh   int64 // bytes of an empty one
	large   int64 // bytes of the one that is fully mapped
	overlay int64 // bytes of a large and nearly empty one
	volume  int64 // bytes of a volume of a pool
	growth  []int64
	depths  []int
	exports int
}

// sizesOfRecord are those of RESULTS.md.
var sizesOfRecord = sizes{
	warm: 6 << 30, full: 2 << 30, fresh: 64 << 30, large: 2 << 40, overlay: 1 << 40, volume: 1 << 40,
	growth: []int64{1 << 30, 10 << 30, 100 << 30, 1000 << 30}, depths: []int{1, 4, 16}, exports: 256,
}

// An env is where lines run.
type env struct {
	sizes
	pairs    int
	scout    bool // look for the best of a peer's choices
	time     time.Duration
	bin      string // csi-qcow2
	self     string // this program
	dir      string // for images; removed at the end
	disk     string // the same, on a disk
	machine  machine
	terminal bool
	made     map[string]bool // images that exist
}

// peerPrograms are what must be installed, and the package that has it.
var peerPrograms = [][2]string{
	{"qemu-nbd", "qemu-utils"}, {"qemu-img", "qemu-utils"}, {"qemu-storage-daemon", "qemu-system-common"},
	{"nbdkit", "nbdkit"}, {"nbdcopy", "libnbd-bin"}, {"nbdfuse", "libnbd-bin"}, {"fio", "fio"},
	{"losetup", "mount"}, {"fusermount3", "fuse3"}, {"cp", "coreutils"},
}

// newEnv checks that the peers are there, and builds our side.
func newEnv(ctx context.Context, o options, s sizes) (_ *env, err error) {
	for _, p := range peerPrograms {
		if _, lookErr := exec.LookPath(p[0]); lookErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: install Debian's package %s, or run: make bench", lookErr, p[1]))
		}
	}
	if err != nil {
		return nil, err
	}
	e := &env{sizes: s, pairs: o.pairs, scout: true, time: o.time, made: make(map[string]bool), terminal: term.IsTerminal(int(os.Stderr.Fd()))}
	if e.self, err = os.Executable(); err != nil {
		return nil, err
	}
	if e.dir, err = os.MkdirTemp(o.dir, "csi-qcow2-bench-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if e.disk, err = os.MkdirTemp(o.disk, "csi-qcow2-bench-"); err != nil {
		return nil, err
	}
	e.bin = e.path("csi-qcow2")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", e.bin, "csi-qcow2/cmd/csi-qcow2")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := run(build); err != nil {
		return nil, err
	}
	if e.machine, err = thisMachine(ctx); err != nil {
		return nil, err
	}
	return e, nil
}

// warmUp uses memory of the tmpfs once: a virtual machine gets it from its host
// page by page, which would be charged to whoever comes first. The host takes back
// what is not used for minutes, so each line begins with it.
func (e *env) warmUp() error {
	e.say("warming up")
	f, err := os.Create(e.path("warm"))
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); off < e.sizes.warm; off += int64(len(buf)) {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return nil
}

// close removes what was made.
func (e *env) close() {
	for _, dir := range []string{e.dir, e.disk} {
		if dir != "" {
			os.RemoveAll(dir) // a leftover of a benchmark; its name says so
		}
	}
}

// path returns the path of a file in the directory of the images.
func (e *env) path(name string) string { return filepath.Join(e.dir, name) }

// image makes the image name unless it exists, and returns its path.
func (e *env) image(name string, make func(path string) error) (string, error) {
	path := e.path(name)
	if e.made[name] {
		return path, nil
	}
	e.say("making %s", name)
	if err := make(path); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	e.made[name] = true
	return path, nil
}

// fullRaw returns a raw file of random bytes.
func (e *env) fullRaw() (string, error) {
	return e.image("full.raw", func(path string) error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		random := rand.NewChaCha8([32]byte{1})
		buf := make([]byte, 1<<20)
		for off := int64(0); off < e.full; off += int64(len(buf)) {
			random.Read(buf) // never fails
			if _, err := f.Write(buf[:min(int64(len(buf)), e.full-off)]); err != nil {
				return err
			}
		}
		return f.Close()
	})
}

// fullImage returns a qcow2 image whose clusters are all allocated.
func (e *env) fullImage(ctx context.Context) (string, error) {
	raw, err := e.fullRaw()
	if err != nil {
		return "", err
	}
	return e.image("full.qcow2", func(path string) error {
		return command(ctx, "qemu-img", "convert", "-W", "-m", "16", "-f", "raw", "-O", "qcow2", raw, path)
	})
}

// mappedImage returns an image of size bytes whose clusters are all mapped; its
// host file has holes for their content.
func (e *env) mappedImage(ctx context.Context, size int64) (string, error) {
	return e.image(fmt.Sprintf("mapped-%d.qcow2", size>>20), func(path string) error {
		return command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, strconv.FormatInt(size, 10))
	})
}

// emptyImage makes a new empty image, in place of an older one of that path.
func (e *env) emptyImage(ctx context.Context, path string, size int64, options ...string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	args := []string{"create", "-q", "-f", "qcow2"}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	return command(ctx, "qemu-img", append(args, path, strconv.FormatInt(size, 10))...)
}

// command runs a program to its end.
func command(ctx context.Context, name string, args ...string) error {
	return run(exec.CommandContext(ctx, name, args...))
}

// run runs cmd; its error tells what it printed.
func run(cmd *exec.Cmd) error {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
