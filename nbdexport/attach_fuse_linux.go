package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/nbdexport/fuse"
	"csi-qcow2/nbdexport/holder"
)

// fuseDriver makes loop devices over FUSE files:
//
//	RunDir/fuse/<ID>/              the mount point, one per device
//	RunDir/fuse/<ID>/<ID>@<tag>    the backend; the loop device's backing file
//
// A mount that was detached from the tree loses the directories above it in sysfs. So all that a
// later process needs to find a device again is in the base name of
// /sys/block/loopN/loop/backing_file. Under the same name a holder has the descriptors to go on with.
type fuseDriver struct {
	dir    string // RunDir/fuse
	names  deviceNames
	holder *holder.Client
}

func newFUSEDriver(runDir string, names deviceNames, h *holder.Client) *fuseDriver {
	return &fuseDriver{dir: filepath.Join(runDir, "fuse"), names: names, holder: h}
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
	undo := []func() error{func() error { return d.removeDir(o.ID) }}
	defer func() {
		for i := len(undo) - 1; i >= 0 && err != nil; i-- {
			err = errors.Join(err, undo[i]())
		}
	}()
	name, size := d.names.name(o.ID), b.Size()
	conn, err := fuse.Mount(dir, b, fuseOptions(name, size, o))
	if err != nil {
		return nil, err
	}
	undo = []func() error{conn.Close, undo[0]} // the mount goes first
	loop, err := loopMake(ctx, loopConfig{d.file(o.ID), o.ReadOnly, o.BlockSize, o.Discard, size})
	if err != nil {
		return nil, err
	}
	// Held from here on: a process that dies before has handed out no path, and its mount goes with it.
	d.hold(name, conn)
	return &fuseDevice{driver: d, opts: o, backend: b, conn: conn, loop: loop}, nil
}

// file is the path of the backend of the device id.
func (d *fuseDriver) file(id string) string { return filepath.Join(d.dir, id, d.names.name(id)) }

func fuseOptions(name string, size int64, o DeviceOptions) fuse.Options {
	return fuse.Options{Name: name, Size: size, ReadOnly: o.ReadOnly, Discard: o.Discard}
}

// reattach goes on with the connection that a holder has of a process that was killed.
func (d *fuseDriver) reattach(_ context.Context, b Backend, o DeviceOptions) (Device, error) {
	name := d.names.name(o.ID)
	loop, found, err := findLoop(name)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("fuse device %q: there is no loop device: %w", o.ID, ErrDeviceGone)
	}
	// The kernel may not have heard of a growth of the backend.
	size, err := sysfsSize(loop.Name)
	if err == nil && size > b.Size() {
		err = fmt.Errorf("%s has %d bytes, its backend only %d", loop.path(), size, b.Size())
	}
	if err != nil {
		return nil, err
	}
	device, slots, err := d.held(name)
	if err != nil {
		return nil, fmt.Errorf("fuse device %q: %w", o.ID, err)
	}
	conn, err := fuse.Adopt(device, slots, b, fuseOptions(name, size, o))
	if errors.Is(err, unix.ENODEV) {
		err = fmt.Errorf("%w: %w", ErrDeviceDead, err)
	}
	if err != nil {
		return nil, err
	}
	d.hold(name, conn)
	return &fuseDevice{driver: d, opts: o, backend: b, conn: conn, loop: loop}, nil
}

// hold has the descriptors of conn held. When that fails the device works all the same; see
// Attacher.Run, which tries again, and Device.Survives.
func (d *fuseDriver) hold(name string, conn *fuse.Conn) {
	if d.holder == nil {
		return
	}
	device, slots := conn.Descriptors()
	if err := d.holder.Put(name, device, slots); err != nil {
		klog.ErrorS(err, "a FUSE device would be lost with this process", "name", name)
	}
}

// held returns what a holder has under name.
func (d *fuseDriver) held(name string) (device, slots *os.File, err error) {
	if d.holder == nil {
		return nil, nil, fmt.Errorf("no holder is used: %w", ErrDeviceGone)
	}
	fds, err := d.holder.Get(name)
	if errors.Is(err, holder.ErrNotHeld) {
		return nil, nil, fmt.Errorf("%w: %w", err, ErrDeviceGone)
	} else if err != nil {
		return nil, nil, err
	}
	if len(fds) != 2 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, nil, fmt.Errorf("%d descriptors are held, want 2: %w", len(fds), ErrDeviceGone)
	}
	return os.NewFile(uintptr(fds[0]), "/dev/fuse"), os.NewFile(uintptr(fds[1]), "fuse slots"), nil
}

// leave leaves what is held under name to the next process.
func (d *fuseDriver) leave(name string) {
	if d.holder != nil {
		d.holder.Leave(name)
	}
}

// drop ends the holding of name.
func (d *fuseDriver) drop(name string) error {
	if d.holder == nil {
		return nil
	}
	return d.holder.Drop(name)
}

// stale finds loop devices over our files, mount points, and held connections, that are not in live.
func (d *fuseDriver) stale(_ context.Context, live map[string]bool) ([]StaleDevice, error) {
	var found []StaleDevice
	seen := make(map[string]bool)
	add := func(id string, loop *loopDevice) {
		if live[id] || seen[id] {
			return
		}
		seen[id] = true
		s := StaleDevice{ID: id, Kind: KindFUSE, clean: func(ctx context.Context) error { return d.clean(ctx, id, loop) }}
		if loop != nil {
			s.Path = loop.path()
		}
		found = append(found, s)
	}
	loops, err := sysfsDevices("loop")
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, name := range loops {
		backing, err := loopDevice{Name: name}.backing()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if id, ours := d.names.id(filepath.Base(backing)); ours {
			add(id, &loopDevice{Name: name, File: d.names.name(id)})
		}
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, e := range entries {
		add(e.Name(), nil)
	}
	if d.holder != nil {
		names, err := d.holder.List()
		errs = append(errs, err)
		for _, name := range names {
			if id, ours := d.names.id(name); ours {
				add(id, nil)
			}
		}
	}
	return found, errors.Join(errs...)
}

// clean removes what is left of a device that nobody serves. loop is nil when that is gone.
func (d *fuseDriver) clean(ctx context.Context, id string, loop *loopDevice) error {
	// The connection ends when it is not held any more: requests fail that would wait for ever.
	if err := d.drop(d.names.name(id)); err != nil {
		return err
	}
	if loop != nil {
		// Nothing is written back: whoever could have taken it is dead.
		if _, err := removeLoop(ctx, *loop, false); err != nil {
			return err
		}
	}
	return d.removeDir(id)
}

// removeLoop clears a loop device, and waits for its openers until ctx ends, at most detachWait.
func removeLoop(ctx context.Context, l loopDevice, writeBack bool) (lost string, err error) {
	wait := detachWait
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	return loopClear(context.WithoutCancel(ctx), loopRemoval{l, writeBack, wait})
}

// removeDir removes the mount of a device that nothing depends on, and its directory.
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

// unmountDir unmounts the FUSE mount on dir. When somebody looks at it (stands in the directory,
// has the file open) the kernel refuses; then the mount leaves the tree all the same, and its
// connection ends at once: what they do next fails. Nothing being mounted there, or no such
// directory, is success.
func unmountDir(dir string) error {
	err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE|unix.MNT_DETACH)
	}
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return &os.PathError{Op: "unmount", Path: dir, Err: err}
}
