package fuse

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

const (
	fsName  = "csi-qcow2" // the mount's source, and its type after "fuse."
	maxName = 255         // bytes of a file's name
)

// Mount mounts f on the existing directory dir and serves it. Nobody but root sees it.
//
// The mount is made with mount(2), not fusermount, on a descriptor with
// O_CLOEXEC: a child that inherited it (mkfs, say) would keep the requests of a
// killed process waiting, with nobody to answer them.
func Mount(dir string, f File, o Options) (*Conn, error) {
	if o.Name == "" || len(o.Name) > maxName {
		return nil, fmt.Errorf("fuse: file name %q: want 1 to %d bytes", o.Name, maxName)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	sl, err := newSlots(maxReaders, maxData)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", fd, maxData)
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME)
	if err := unix.Mount(fsName, dir, "fuse."+fsName, flags, opts); err != nil {
		return nil, errors.Join(fmt.Errorf("mount fuse on %q: %w", dir, err), sl.close(), unix.Close(fd))
	}
	c, err := newConn(fd, sl, f, o, nil)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("serve fuse on %q: %w", dir, err), unix.Unmount(dir, unix.MNT_DETACH))
	}
	return c, nil
}

// Adopt goes on serving a mount of an ended process, whose descriptors it owns
// from here on, also when it fails. o and the content of f are the mount's. It
// returns ErrSlots when that is not possible; then the mount's requests fail as
// soon as nobody has the device any more.
func Adopt(device, slots *os.File, f File, o Options) (*Conn, error) {
	return adopt(device, slots, f, o, nil)
}

// adopt is Adopt. at is as in newConn.
func adopt(device, slots *os.File, f File, o Options, at func(point)) (*Conn, error) {
	fd, err := dupNonblock(device)
	if err != nil {
		return nil, errors.Join(err, slots.Close())
	}
	if disconnected(fd) {
		return nil, errors.Join(fmt.Errorf("fuse: the mount is gone: %w", unix.ENODEV), unix.Close(fd), slots.Close())
	}
	sl, err := openSlots(slots)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return newConn(fd, sl, f, o, at)
}

// dupNonblock returns a descriptor of what f is, which it closes. The mode is the
// device's, and is as Mount has set it.
func dupNonblock(f *os.File) (int, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return -1, errors.Join(err, f.Close())
	}
	fd := -1
	var dupErr error
	err = conn.Control(func(old uintptr) { fd, dupErr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil && fd >= 0 {
		err = errors.Join(err, unix.Close(fd))
	}
	return fd, errors.Join(err, f.Close())
}
