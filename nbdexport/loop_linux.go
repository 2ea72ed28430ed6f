package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/aside"
	"csi-qcow2/nbdexport/fuse"
)

const loopControl = "/dev/loop-control"

// loopAttempts bounds the free loop devices that others may take between our asking for one
// and our setting it up.
const loopAttempts = 64

// A loopDevice is a loop device set up over a file. The kernel shows the path of that file in
// sysfs, whether or not anyone serves the file system it is on; its last element is how we know our
// devices (see deviceNames).
type loopDevice struct {
	Name string // loopN
	File string // last element of the backing file's path
}

func (l loopDevice) path() string { return "/dev/" + l.Name }

// What may wait for the server of the backing file is done by a child: see package aside.
var (
	loopMake   = aside.Op("loop make", makeLoop)
	loopResize = aside.Op("loop resize", resizeLoop, ErrDeviceGone)
	loopClear  = aside.Op("loop clear", clearLoop, ErrDeviceBusy)
)

// A loopConfig says what device to make.
type loopConfig struct {
	Path      string // of the backing file
	ReadOnly  bool
	BlockSize int
	Discard   bool
	Size      int64 // bytes that the device must have
}

// makeLoop sets a free loop device up.
func makeLoop(c loopConfig, _ []*os.File) (l loopDevice, err error) {
	flag := unix.O_RDWR
	if c.ReadOnly {
		flag = unix.O_RDONLY
	}
	var fd int
	err = ignoringEINTR(func() error {
		fd, err = unix.Open(c.Path, flag|unix.O_CLOEXEC, 0) // not os.Open: the runtime's poller would ask us
		return err
	})
	if err != nil {
		return loopDevice{}, fmt.Errorf("open %q: %w", c.Path, err)
	}
	defer unix.Close(fd) // the loop device has its own reference
	l, err = setUpLoop(fd, c)
	if errors.Is(err, errDiscardLimit) {
		l.remove()
		l, err = setUpLoop(fd, c)
	}
	return l, err
}

// setUpLoop sets a free loop device up over the open file fd. With an error the device it names is free again.
func setUpLoop(fd int, c loopConfig) (loopDevice, error) {
	l, err := configureLoop(fd, c)
	if err != nil {
		return loopDevice{}, err
	}
	if err := l.check(c); err != nil {
		// Its path was never handed out. Nothing is written back, so nothing is lost.
		_, clearErr := clearLoop(loopRemoval{loopDevice: l, Wait: detachWait}, nil)
		return l, errors.Join(err, clearErr)
	}
	return l, nil
}

// remove takes a free device from the kernel, with all that its users have set: the next one of its
// number is new. One that somebody has taken, or looks at, stays.
func (l loopDevice) remove() {
	n, err := strconv.Atoi(strings.TrimPrefix(l.Name, "loop"))
	if err != nil {
		return
	}
	control, err := os.OpenFile(loopControl, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer control.Close()
	_ = unix.IoctlSetInt(int(control.Fd()), unix.LOOP_CTL_REMOVE, n)
}

// check completes a new device.
func (l loopDevice) check(c loopConfig) error {
	if c.Discard {
		if err := l.allowDiscard(); err != nil {
			return err
		}
	}
	size, err := sysfsSize(l.Name)
	if err == nil && size != c.Size {
		err = fmt.Errorf("%s has %d bytes, want %d", l.path(), size, c.Size)
	}
	return err
}

// configureLoop sets a free loop device up over the open file fd.
func configureLoop(fd int, c loopConfig) (loopDevice, error) {
	file := filepath.Base(c.Path)
	control, err := os.OpenFile(loopControl, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return loopDevice{}, err
	}
	defer control.Close()

	config := unix.LoopConfig{Fd: uint32(fd), Size: uint32(c.BlockSize)}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if c.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], file)

	for range loopAttempts {
		// GET_FREE reserves nothing: two callers may get the same number, and
		// LOOP_CONFIGURE tells the slower one EBUSY.
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return loopDevice{}, fmt.Errorf("find a free loop device: %w", err)
		}
		l := loopDevice{Name: fmt.Sprintf("loop%d", n), File: file}
		err = l.with(os.O_RDWR, func(dev int) error { return unix.IoctlLoopConfigure(dev, &config) })
		switch {
		case err == nil:
			return l, nil
		case errors.Is(err, unix.EBUSY):
			continue
		}
		return loopDevice{}, fmt.Errorf("set up %s: %w", l.path(), err)
	}
	return loopDevice{}, fmt.Errorf("set up a loop device: %d were taken by others: %w", loopAttempts, unix.EBUSY)
}

// with calls f with the device node open. While it is open, the device's backing file does not change: a
// LOOP_CLR_FD by anyone waits for the last close.
func (l loopDevice) with(flag int, f func(fd int) error) error {
	dev, err := openNode(context.Background(), l.path(), flag)
	if err != nil {
		return err
	}
	defer dev.Close()
	return ignoringEINTR(func() error { return f(int(dev.Fd())) })
}

// backing returns the path of the backing file, as the kernel prints it; "" when the device is not
// set up.
func (l loopDevice) backing() (string, error) {
	path, err := sysfsValue(l.Name, "loop/backing_file")
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	// The kernel says so when the file system was detached from the tree.
	return strings.TrimSuffix(path, " (deleted)"), err
}

// bound reports whether the device is set up over the file it was made for.
func (l loopDevice) bound() (bool, error) {
	path, err := l.backing()
	return path != "" && filepath.Base(path) == l.File, err
}

// errDiscardLimit reports that a device cannot have discards because of what an earlier user has set.
var errDiscardLimit = errors.New("nbdexport: limit of discards")

// allowDiscard lifts a limit on discards that an earlier user of the loop device wrote: the
// kernel keeps it when the device is set up anew. Newer ones take no other limit after 0, see errDiscardLimit.
func (l loopDevice) allowDiscard() error {
	limit, err := sysfsValue(l.Name, "queue/discard_max_bytes")
	if err != nil || limit != "0" {
		return err
	}
	hard, err := sysfsValue(l.Name, "queue/discard_max_hw_bytes")
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(hard, 10, 64)
	if err != nil {
		return err
	}
	// The kernel wants a multiple of the granularity.
	err = setSysfsValue(l.Name, "queue/discard_max_bytes", strconv.FormatUint(n&^(fuse.BlockSize-1), 10))
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: %w", errDiscardLimit, err)
	}
	return err
}

// A loopSize is a device with a size in bytes.
type loopSize struct {
	loopDevice
	Path string // of its backing file
	Size int64
}

// resizeLoop makes the device as long as its backing file is now, which must be r.Size.
func resizeLoop(r loopSize, _ []*os.File) (struct{}, error) {
	return struct{}{}, r.with(os.O_RDONLY, func(fd int) error {
		if ok, err := r.bound(); err != nil || !ok {
			return errors.Join(fmt.Errorf("%s: %w", r.path(), ErrDeviceGone), err)
		}
		if err := r.learn(); err != nil {
			return err
		}
		if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
			return fmt.Errorf("set the capacity of %s: %w", r.path(), err)
		}
		if got, err := sysfsSize(r.Name); err != nil || got != r.Size {
			return errors.Join(fmt.Errorf("%s has %d bytes after a resize to %d", r.path(), got, r.Size), err)
		}
		return nil
	})
}

// learnTimeout bounds how long the file system may take to learn a size.
const learnTimeout = 30 * time.Second

// learn makes the file system know the size of the backing file. Being told is not enough: it drops an
// answer when a write has ended since it asked, and a read behind the size that it knows
// would fail. So it is asked again until it knows.
func (r loopSize) learn() error {
	ctx, cancel := context.WithTimeout(context.Background(), learnTimeout)
	defer cancel()
	var known int64
	err := poll(ctx, func() (bool, error) {
		for _, sync := range []int{unix.AT_STATX_FORCE_SYNC, unix.AT_STATX_DONT_SYNC} {
			var st unix.Statx_t
			if err := ignoringEINTR(func() error { return unix.Statx(unix.AT_FDCWD, r.Path, sync, unix.STATX_SIZE, &st) }); err != nil {
				return false, fmt.Errorf("stat %q: %w (is the mount on the directory above visible to this process?)", r.Path, err)
			}
			known = int64(st.Size)
		}
		return known == r.Size, nil
	})
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("the file system knows %d bytes of %q, want %d: %w", known, r.Path, r.Size, err)
	}
	return err
}

// A loopRemoval says how a device is taken from its backing file.
type loopRemoval struct {
	loopDevice
	WriteBack bool          // what the kernel holds for it
	Wait      time.Duration // for openers
}

// clearLoop takes the device from its backing file, after writing back what the kernel holds for it
// when that is asked for. It waits for openers, then returns ErrDeviceBusy with the device as it was. A
// device that is not bound to our file any more is success. lost, not "" when the write back failed, says
// why, which the kernel tells once: the device is cleared all the same, unless err says otherwise.
func clearLoop(r loopRemoval, _ []*os.File) (lost string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), r.Wait)
	defer cancel()
	err = poll(ctx, func() (bool, error) {
		if ok, err := r.bound(); err != nil || !ok {
			return true, err
		}
		dev, err := openExclusive(r.path())
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		defer dev.Close()
		if ok, err := r.bound(); err != nil || !ok {
			return true, err
		}
		if r.WriteBack {
			if err := dev.Sync(); err != nil {
				lost = fmt.Sprintf("write back %s: %v", r.path(), err)
			}
		}
		// With us as the only opener the device is cleared when we close it; with others, when the
		// last of them does.
		if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
			return false, fmt.Errorf("clear %s: %w", r.path(), err)
		}
		return false, nil
	})
	if err == nil || ctx.Err() == nil {
		return lost, err
	}
	if err := r.keep(); err != nil {
		return lost, err
	}
	if ok, err := r.bound(); err != nil || !ok {
		return lost, err // the last opener went just now
	}
	return lost, fmt.Errorf("%s: %w", r.path(), ErrDeviceBusy)
}

// keep takes back a LOOP_CLR_FD that waits for openers, so that the device outlives them.
func (l loopDevice) keep() error {
	dev, err := os.OpenFile(l.path(), os.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer dev.Close()
	if ok, err := l.bound(); err != nil || !ok {
		return err
	}
	if autoclear, err := sysfsValue(l.Name, "loop/autoclear"); err != nil || autoclear == "0" {
		return err
	}
	var info unix.LoopInfo64 // every field but the flags as configureLoop set it
	copy(info.File_name[:len(info.File_name)-1], l.File)
	err = unix.IoctlLoopSetStatus64(int(dev.Fd()), &info)
	if errors.Is(err, unix.ENXIO) {
		return nil // cleared meanwhile
	}
	return err
}

// findLoop returns the loop device over the file called file, if there is one.
func findLoop(file string) (l loopDevice, ok bool, err error) {
	names, err := sysfsDevices("loop")
	if err != nil {
		return loopDevice{}, false, err
	}
	for _, name := range names {
		l := loopDevice{Name: name, File: file}
		if ok, err := l.bound(); ok || err != nil {
			return l, ok, err
		}
	}
	return loopDevice{}, false, nil
}

// ignoringEINTR calls f again for as long as a signal interrupts it: the runtime's preemption is one.
func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
