package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"
)

// linuxHost is the operating system.
type linuxHost struct{ mounter mount.Interface }

// NewHost returns the Host of this machine.
func NewHost() Host { return linuxHost{mount.New("")} }

// Mounts implements Host.
func (linuxHost) Mounts(target string) ([]Mount, error) {
	// The mount table has no symbolic links, a kubelet's directory may. What is
	// mounted at target itself is not looked at: it may be dead.
	dir, err := filepath.EvalSymlinks(filepath.Dir(target))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	target = filepath.Join(dir, filepath.Base(target))
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.Mountpoint != target, false })
	if err != nil {
		return nil, err
	}
	mounts := make([]Mount, len(infos))
	for i, info := range infos {
		mounts[i] = Mount{
			Device:   unix.Mkdev(uint32(info.Major), uint32(info.Minor)),
			Root:     info.Root,
			Type:     info.FSType,
			ReadOnly: slices.Contains(strings.Split(info.Options, ","), "ro"),
		}
	}
	return mounts, nil
}

// Mount implements Host.
func (h linuxHost) Mount(source, target, fstype string, options []string) error {
	return h.mounter.MountSensitiveWithoutSystemd(source, target, fstype, options, nil)
}

// Unmount implements Host. It asks the kernel itself: umount(8) would look at
// the mount first, which can hang when its device is dead.
func (linuxHost) Unmount(target string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(target, flags); err != nil {
		return &fs.PathError{Op: "unmount", Path: target, Err: err}
	}
	return nil
}

// Sync implements Host.
func (linuxHost) Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return &fs.PathError{Op: "syncfs", Path: path, Err: err}
	}
	return nil
}

// Usage implements Host.
func (linuxHost) Usage(path string) (Usage, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return Usage{}, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return Usage{
		Total:      int64(st.Blocks) * st.Bsize,
		Available:  int64(st.Bavail) * st.Bsize,
		Used:       int64(st.Blocks-st.Bfree) * st.Bsize,
		Inodes:     int64(st.Files),
		InodesFree: int64(st.Ffree),
		InodesUsed: int64(st.Files - st.Ffree),
	}, nil
}

// DeviceNumber implements Host.
func (linuxHost) DeviceNumber(path string) (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		return 0, nil
	case err != nil:
		return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	case st.Mode&unix.S_IFMT != unix.S_IFBLK:
		return 0, nil
	}
	return st.Rdev, nil
}

// SetReadOnly implements Host.
func (linuxHost) SetReadOnly(device string, readOnly bool) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	value := 0
	if readOnly {
		value = 1
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, value); err != nil {
		return &fs.PathError{Op: "BLKROSET", Path: device, Err: err}
	}
	return nil
}

// endBytes is how much ReadEnds reads at each end.
const endBytes = 1 << 20

// ReadEnds implements Host.
func (linuxHost) ReadEnds(device string) error {
	f, err := os.OpenFile(device, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	// A mapping is aligned as O_DIRECT wants its memory.
	buf, err := unix.Mmap(-1, 0, endBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(buf)
	n := min(int64(endBytes), size)
	for _, off := range []int64{0, size - n} {
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return fmt.Errorf("read %d bytes at %#x: %w", n, off, err)
		}
	}
	return nil
}

// A ToolError is a program that failed.
type ToolError struct {
	Name   string
	Status int // exit status, -1 when it did not exit
	Stderr string
	Err    error
}

func (e *ToolError) Error() string {
	return fmt.Sprintf("%s: %v: %s", e.Name, e.Err, strings.TrimSpace(e.Stderr))
}

func (e *ToolError) Unwrap() error { return e.Err }

// maxToolOutput bounds what is kept of a program's output, in bytes.
const maxToolOutput = 4 << 10

// runTool runs a program with fixed arguments, without a shell and with an
// empty environment but for PATH.
func runTool(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil {
		return nil
	}
	status := -1
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		status = exit.ExitCode()
	}
	text := out.Bytes()
	return &ToolError{Name: name, Status: status, Stderr: string(text[max(0, len(text)-maxToolOutput):]), Err: err}
}
