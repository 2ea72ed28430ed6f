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

	"golang.org/x/sys/unix"
)

const loopControl = "/dev/loop-control"

// loopAttempts bounds the free loop devices that others may take between our asking for one
// and our setting it up.
const loopAttempts = 64

// A loopDevice is a loop device set up over a file. The kernel shows the path of that file in
// sysfs, whether or not anyone serves the file system it is on; its last element is how we know our
// devices (see deviceNames).
type loopDevice struct {
	name string // loopN
	file string // last element of the backing file's path
}

func (l loopDevice) path() string { return "/dev/" + l.name }

// configureLoop sets a free loop device up over the open file fd, whose name is file.
func configureLoop(ctx context.Context, fd int, file string, o DeviceOptions) (loopDevice, error) {
	control, err := os.OpenFile(loopControl, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return loopDevice{}, err
	}
	defer control.Close()

	config := unix.LoopConfig{Fd: uint32(fd), Size: uint32(o.BlockSize)}
	config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
	if o.ReadOnly {
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
		l := loopDevice{name: fmt.Sprintf("loop%d", n), file: file}
		err = l.with(ctx, os.O_RDWR, func(dev int) error { return unix.IoctlLoopConfigure(dev, &config) })
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
func (l loopDevice) with(ctx context.Context, flag int, f func(fd int) error) error {
	dev, err := openNode(ctx, l.path(), flag)
	if err != nil {
		return err
	}
	defer dev.Close()
	return ignoringEINTR(func() error { return f(int(dev.Fd())) })
}

// backing returns the path of the backing file, as the kernel prints it; "" when the device is not
// set up.
func (l loopDevice) backing() (string, error) {
	path, err := sysfsValue(l.name, "loop/backing_file")
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	// The kernel says so when the file system was detached from the tree.
	return strings.TrimSuffix(path, " (deleted)"), err
}

// bound reports whether the device is set up over the file it was made for.
func (l loopDevice) bound() (bool, error) {
	path, err := l.backing()
	return path != "" && filepath.Base(path) == l.file, err
}

// allowDiscard lifts a limit on discards that an earlier user of the loop device wrote: the
// kernel keeps it when the device is set up anew.
func (l loopDevice) allowDiscard() error {
	limit, err := sysfsValue(l.name, "queue/discard_max_bytes")
	if err != nil || limit != "0" {
		return err
	}
	hard, err := sysfsValue(l.name, "queue/discard_max_hw_bytes")
	if err != nil {
		return err
	}
	n, err := strconv.ParseUint(hard, 10, 64)
	if err != nil {
		return err
	}
	// The kernel wants a multiple of the granularity.
	return setSysfsValue(l.name, "queue/discard_max_bytes", strconv.FormatUint(n&^(fuseBlkSize-1), 10))
}

// resize makes the device as long as its backing file is now, which must be size.
func (l loopDevice) resize(ctx context.Context, size int64) error {
	return l.with(ctx, os.O_RDONLY, func(fd int) error {
		if ok, err := l.bound(); err != nil || !ok {
			return errors.Join(fmt.Errorf("%s: %w", l.path(), ErrDeviceGone), err)
		}
		if err := unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0); err != nil {
			return fmt.Errorf("set the capacity of %s: %w", l.path(), err)
		}
		if got, err := sysfsSize(l.name); err != nil || got != size {
			return errors.Join(fmt.Errorf("%s has %d bytes after a resize to %d", l.path(), got, size), err)
		}
		return nil
	})
}

// clear takes the device from its backing file, after writing back what the kernel holds for it
// when writeBack is set. It waits for openers until ctx ends, then returns ErrDeviceBusy with the
// device as it was. A device that is not bound to our file any more is success. lost is
// ErrNotFlushed when the write back failed, which the kernel tells once: the device is cleared all
// the same, unless err says otherwise.
func (l loopDevice) clear(ctx context.Context, writeBack bool) (lost, err error) {
	err = poll(ctx, func() (bool, error) {
		if ok, err := l.bound(); err != nil || !ok {
			return true, err
		}
		dev, err := openExclusive(l.path())
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		defer dev.Close()
		if ok, err := l.bound(); err != nil || !ok {
			return true, err
		}
		if writeBack {
			if err := dev.Sync(); err != nil {
				lost = fmt.Errorf("write back %s: %w: %w", l.path(), ErrNotFlushed, err)
			}
		}
		// With us as the only opener the device is cleared when we close it; with others, when the
		// last of them does.
		if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !errors.Is(err, unix.ENXIO) {
			return false, fmt.Errorf("clear %s: %w", l.path(), err)
		}
		return false, nil
	})
	if err == nil || ctx.Err() == nil {
		return lost, err
	}
	if err := l.keep(); err != nil {
		return lost, err
	}
	if ok, err := l.bound(); err != nil || !ok {
		return lost, err // the last opener went just now
	}
	return lost, fmt.Errorf("%s: %w", l.path(), ErrDeviceBusy)
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
	if autoclear, err := sysfsValue(l.name, "loop/autoclear"); err != nil || autoclear == "0" {
		return err
	}
	var info unix.LoopInfo64 // every field but the flags as configureLoop set it
	copy(info.File_name[:len(info.File_name)-1], l.file)
	err = unix.IoctlLoopSetStatus64(int(dev.Fd()), &info)
	if errors.Is(err, unix.ENXIO) {
		return nil // cleared meanwhile
	}
	return err
}
