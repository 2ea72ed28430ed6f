package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/nbdexport/fuse"
)

// fuseDevice is a loop device over a FUSE file that this process serves.
//
// Its promise depends on a holder (see package holder), a second process that keeps the FUSE
// connection while nobody serves: requests wait then for the next process. Without one, the kernel
// ends the connection when this process dies, and every request after that fails with EIO.
// Acknowledged writes that the filesystem had flushed are safe in the image, as after a power loss;
// the device must be cleaned (see [Attacher.Stale]) and attached anew.
type fuseDevice struct {
	driver  *fuseDriver
	opts    DeviceOptions
	backend Backend
	conn    *fuse.Conn
	loop    loopDevice

	mu       sync.Mutex // held over kernel calls; Resize and Detach, one at a time
	detached bool       // guarded by mu
	lost     error      // write back that failed, as ErrNotFlushed, to be told at the end; guarded by mu
}

func (d *fuseDevice) Path() string { return d.loop.path() }
func (d *fuseDevice) Kind() string { return KindFUSE }
func (d *fuseDevice) Size() int64  { return d.conn.Size() }

func (d *fuseDevice) Health() error {
	switch ok, err := d.loop.bound(); {
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("%s: %w", d.Path(), ErrDeviceGone)
	case d.conn.Dead():
		return fmt.Errorf("%s: %w", d.Path(), ErrDeviceDead)
	}
	return nil
}

func (d *fuseDevice) Survives() error {
	if d.driver.holder == nil {
		return errors.New("nbdexport: no holder is used")
	}
	return d.driver.holder.Err()
}

func (d *fuseDevice) Resize(ctx context.Context, size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := checkResize(d, d.opts, d.backend, size)
	if err == nil {
		d.conn.SetSize(size)
		_, err = loopResize(ctx, loopSize{d.loop, d.driver.file(d.opts.ID), size})
	}
	if err != nil {
		return fmt.Errorf("resize %q: %w", d.opts.ID, err)
	}
	return nil
}

func (d *fuseDevice) Detach(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.detached {
		return nil
	}
	lost, err := removeLoop(ctx, d.loop, !d.conn.Dead())
	if lost != "" {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %s", ErrNotFlushed, lost))
	}
	if err != nil {
		return err
	}
	// Nothing depends on the connection any more: it may end with this process.
	if err := d.driver.drop(d.loop.File); err != nil {
		return err
	}
	if err := d.driver.removeDir(d.opts.ID); err != nil {
		return err
	}
	d.stop()
	d.detached = true
	if err := d.backend.Flush(); err != nil {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %w", ErrNotFlushed, err))
	}
	return d.lost
}

// stop ends the serving and waits until no request is being served.
func (d *fuseDevice) stop() {
	if err := d.conn.Close(); err != nil && !errors.Is(err, unix.ENODEV) {
		klog.ErrorS(err, "fuse connection ended", "deviceID", d.opts.ID)
	}
}

// Leave leaves the connection to the holder. Without one the kernel ends it.
func (d *fuseDevice) Leave() {
	d.driver.leave(d.loop.File)
	d.stop()
}
