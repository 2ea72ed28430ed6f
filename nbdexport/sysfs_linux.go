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
)

// sysBlock is where the kernel shows block devices. Reading it never touches a device's data.
const sysBlock = "/sys/block"

// sysfsValue reads an attribute of a block device, /sys/block/<dev>/<attr>. An attribute that is
// not there (the device is not set up) is fs.ErrNotExist.
func sysfsValue(dev, attr string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysBlock, dev, attr))
	if err != nil {
		// A driver may refuse to show an attribute of a device that is being torn down.
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%s/%s: %w", dev, attr, fs.ErrNotExist)
		}
		return "", err
	}
	return strings.TrimSuffix(string(b), "\n"), nil
}

// setSysfsValue writes an attribute of a block device.
func setSysfsValue(dev, attr, value string) error {
	f, err := os.OpenFile(filepath.Join(sysBlock, dev, attr), os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// sysfsDevices lists the block devices called prefix and a number, in no special order.
func sysfsDevices(prefix string) ([]string, error) {
	entries, err := os.ReadDir(sysBlock)
	if err != nil {
		return nil, err
	}
	var devs []string
	for _, e := range entries {
		n, ok := strings.CutPrefix(e.Name(), prefix)
		if _, err := strconv.ParseUint(n, 10, 31); ok && err == nil {
			devs = append(devs, e.Name())
		}
	}
	return devs, nil
}

// sysfsSize is the size of a block device in bytes, as the kernel has it.
func sysfsSize(dev string) (int64, error) {
	s, err := sysfsValue(dev, "size")
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(s, 10, 64)
	return sectors * 512, err
}

// nodeWait bounds the wait for a device node after its device was made.
const nodeWait = 10 * time.Second

// openNode opens a device node, which may appear a moment after its device.
func openNode(ctx context.Context, path string, flag int) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, nodeWait)
	defer cancel()
	var f *os.File
	err := poll(ctx, func() (bool, error) {
		var err error
		f, err = os.OpenFile(path, flag|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
			return false, nil
		}
		return true, err
	})
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("open %s: the device node has not appeared (is the host's /dev mounted here?): %w", path, err)
	}
	return f, err
}

// openExclusive opens a device node and claims it, as a mount does: it fails with EBUSY while
// a filesystem, a device-mapper table or swap holds it, and those fail while we do. It opens for
// reading, because udev probes a device when a descriptor that could write is closed.
func openExclusive(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
}

// pollInterval is how often a condition in the kernel that cannot be waited for is looked at.
const pollInterval = 10 * time.Millisecond

// poll calls f until it returns true or an error, or ctx ends.
func poll(ctx context.Context, f func() (bool, error)) error {
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}
