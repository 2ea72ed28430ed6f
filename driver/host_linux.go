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
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	mount "k8s.io/mount-utils"

	"csi-qcow2/internal/aside"
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

// What may wait for a device of ours is done by a child: see package aside.
var (
	unmountAside     = aside.Op("unmount", unmount)
	syncAside        = aside.Op("sync filesystem", syncFilesystem)
	usageAside       = aside.Op("filesystem usage", usage)
	setReadOnlyAside = aside.Op("set read-only", setReadOnly)
	readEndsAside    = aside.Op("read ends", readEnds)
)

// Unmount implements Host.
func (linuxHost) Unmount(target string, lazy bool) error {
	_, err := unmountAside(context.Background(), unmounting{target, lazy})
	return err
}

// Sync implements Host.
func (linuxHost) Sync(path string) error {
	_, err := syncAside(context.Background(), path)
	return err
}

// Usage implements Host.
func (linuxHost) Usage(path string) (Usage, error) { return usageAside(context.Background(), path) }

// An unmounting is what Unmount is asked for.
type unmounting struct {
	Target string
	Lazy   bool
}

// unmount asks the kernel itself: umount(8) would look at the mount first, which can hang when its
// device is dead.
func unmount(u unmounting, _ []*os.File) (struct{}, error) {
	flags := unix.UMOUNT_NOFOLLOW
	if u.Lazy {
		flags |= unix.MNT_DETACH
	}
	if err := unix.Unmount(u.Target, flags); err != nil {
		return struct{}{}, &fs.PathError{Op: "unmount", Path: u.Target, Err: err}
	}
	return struct{}{}, nil
}

func syncFilesystem(path string, _ []*os.File) (struct{}, error) {
	f, err := os.Open(path)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return struct{}{}, &fs.PathError{Op: "syncfs", Path: path, Err: err}
	}
	return struct{}{}, nil
}

func usage(path string, _ []*os.File) (Usage, error) {
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
	_, err := setReadOnlyAside(context.Background(), deviceMode{device, readOnly})
	return err
}

// A deviceMode is what SetReadOnly is asked for.
type deviceMode struct {
	Device   string
	ReadOnly bool
}

func setReadOnly(m deviceMode, _ []*os.File) (struct{}, error) {
	f, err := os.Open(m.Device)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	value := 0
	if m.ReadOnly {
		value = 1
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.BLKROSET, value); err != nil {
		return struct{}{}, &fs.PathError{Op: "BLKROSET", Path: m.Device, Err: err}
	}
	return struct{}{}, nil
}

// endBytes is how much ReadEnds reads at each end.
const endBytes = 1 << 20

// ReadEnds implements Host.
func (linuxHost) ReadEnds(device string) error {
	_, err := readEndsAside(context.Background(), device)
	return err
}

func readEnds(device string, _ []*os.File) (struct{}, error) {
	f, err := os.OpenFile(device, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return struct{}{}, err
	}
	// A mapping is aligned as O_DIRECT wants its memory.
	buf, err := unix.Mmap(-1, 0, endBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return struct{}{}, err
	}
	defer unix.Munmap(buf)
	n := min(int64(endBytes), size)
	for _, off := range []int64{0, size - n} {
		if _, err := f.ReadAt(buf[:n], off); err != nil {
			return struct{}{}, fmt.Errorf("read %d bytes at %#x: %w", n, off, err)
		}
	}
	return struct{}{}, nil
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
	// When this process is killed the program ends too: a successor starts it again. It is killed when this
	// thread dies, which does not outlive the process.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
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
