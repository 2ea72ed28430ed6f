package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
)

// fuseDevice is a loop device over a FUSE file that this process serves.
//
// Its promise is weaker than that of an nbd device: when this process dies, the kernel ends
// the FUSE connection, and every request after that fails with EIO. Acknowledged writes that the
// filesystem had flushed are safe in the image, as after a power loss; the device must be
// cleaned (see [Attacher.Stale]) and attached anew.
type fuseDevice struct {
	opts    DeviceOptions
	backend Backend
	mount   *fuseMount
	loop    loopDevice

	mu       sync.Mutex // held over kernel calls; Resize and Detach, one at a time
	detached bool       // guarded by mu
	lost     error      // write back that failed, as ErrNotFlushed, to be told at the end; guarded by mu
}

func (d *fuseDevice) Path() string { return d.loop.path() }
func (d *fuseDevice) Kind() string { return KindFUSE }
func (d *fuseDevice) Size() int64  { return d.mount.size.Load() }

func (d *fuseDevice) Health() error {
	switch ok, err := d.loop.bound(); {
	case err != nil:
		return err
	case !ok:
		return fmt.Errorf("%s: %w", d.Path(), ErrDeviceGone)
	case d.mount.dead():
		return fmt.Errorf("%s: %w", d.Path(), ErrDeviceDead)
	}
	return nil
}

func (d *fuseDevice) Resize(ctx context.Context, size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := checkResize(d, d.opts, d.backend, size); err != nil {
		return fmt.Errorf("resize %q: %w", d.opts.ID, err)
	}
	if err := d.mount.grow(size); err != nil {
		return fmt.Errorf("resize %q: %w", d.opts.ID, err)
	}
	if err := d.loop.resize(ctx, size); err != nil {
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
	ctx, cancel := context.WithTimeout(ctx, detachWait)
	defer cancel()
	lost, err := d.loop.clear(ctx, !d.mount.dead())
	d.lost = errors.Join(d.lost, lost)
	if err != nil {
		return err
	}
	if err := d.mount.unmount(); err != nil {
		return err
	}
	if err := os.Remove(d.mount.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.detached = true
	if err := d.backend.Flush(); err != nil {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %w", ErrNotFlushed, err))
	}
	return d.lost
}

// Leave keeps nothing: the kernel ends the mount with the process.
func (d *fuseDevice) Leave() {}
