package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// fuseDriver makes loop devices over FUSE files:
//
//	RunDir/fuse/<ID>/              the mount point, one per device
//	RunDir/fuse/<ID>/<ID>@<tag>    the backend; the loop device's backing file
//
// A mount that was detached from the tree loses the directories above it in sysfs. So all that a
// later process needs to find a device again is in the base name of
// /sys/block/loopN/loop/backing_file.
type fuseDriver struct {
	dir   string // RunDir/fuse
	names deviceNames
}

func newFUSEDriver(runDir string, names deviceNames) *fuseDriver {
	return &fuseDriver{dir: filepath.Join(runDir, "fuse"), names: names}
}

func (d *fuseDriver) usable() error {
	loadModule("fuse")
	loadModule("loop")
	for _, path := range []string{"/dev/fuse", loopControl} {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%w: fuse: %w (it needs the kernel's fuse and loop drivers, and root)", ErrNoDeviceKind, err)
		}
		f.Close()
	}
	return nil
}

func (d *fuseDriver) attach(ctx context.Context, b Backend, o DeviceOptions) (_ Device, err error) {
	dir := filepath.Join(d.dir, o.ID)
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return nil, err
	}
	// Not MkdirAll: a directory that is there belongs to a dead device, which Stale reports.
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("%w (left by an earlier process? clean what Stale lists)", err)
	}
	undo := []func() error{func() error { return os.Remove(dir) }}
	defer func() {
		for i := len(undo) - 1; i >= 0 && err != nil; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	mount, err := mountFUSE(dir, d.names.name(o.ID), b, o)
	if err != nil {
		return nil, err
	}
	undo = append(undo, mount.unmount)

	flag := unix.O_RDWR
	if o.ReadOnly {
		flag = unix.O_RDONLY
	}
	var fd int
	err = ignoringEINTR(func() error {
		fd, err = unix.Open(mount.path(), flag|unix.O_CLOEXEC, 0) // not os.Open: see grow
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", mount.path(), err)
	}
	defer unix.Close(fd) // the loop device has its own reference
	loop, err := configureLoop(ctx, fd, mount.name, o)
	if err != nil {
		return nil, err
	}
	undo = append(undo, func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), detachWait)
		defer cancel()
		_, err := loop.clear(ctx, false) // nothing is written back, so nothing is lost
		return err
	})
	if o.Discard {
		if err := loop.allowDiscard(); err != nil {
			return nil, err
		}
	}
	size, err := sysfsSize(loop.name)
	if err != nil {
		return nil, err
	}
	if size != b.Size() {
		return nil, fmt.Errorf("%s has %d bytes, want %d", loop.path(), size, b.Size())
	}
	return &fuseDevice{opts: o, backend: b, mount: mount, loop: loop}, nil
}

// stale finds loop devices over our files, and mount points, that are not in live.
func (d *fuseDriver) stale(_ context.Context, live map[string]bool) ([]StaleDevice, error) {
	var found []StaleDevice
	seen := make(map[string]bool)
	loops, err := sysfsDevices("loop")
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, name := range loops {
		backing, err := loopDevice{name: name}.backing()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		id, ours := d.names.id(filepath.Base(backing))
		if !ours || live[id] {
			continue
		}
		seen[id] = true
		loop := loopDevice{name: name, file: d.names.name(id)}
		found = append(found, StaleDevice{ID: id, Kind: KindFUSE, Path: loop.path(), clean: func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, detachWait)
			defer cancel()
			// Nothing is written back: whoever could have taken it is dead.
			if _, err := loop.clear(ctx, false); err != nil {
				return err
			}
			return d.removeDir(id)
		}})
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		if id := e.Name(); !live[id] && !seen[id] {
			found = append(found, StaleDevice{ID: id, Kind: KindFUSE, clean: func(context.Context) error { return d.removeDir(id) }})
		}
	}
	return found, errors.Join(errs...)
}

// removeDir removes the mount of a dead device, and its directory.
func (d *fuseDriver) removeDir(id string) error {
	dir := filepath.Join(d.dir, id)
	if err := unmountDir(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// reattach finds nothing: the kernel has ended the mount with the process that served it.
func (d *fuseDriver) reattach(_ context.Context, _ Backend, o DeviceOptions) (Device, error) {
	return nil, fmt.Errorf("fuse device %q: %w", o.ID, ErrDeviceGone)
}
