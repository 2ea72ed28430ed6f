package volume

import (
	"context"
	"fmt"
	"sync"

	"csi-qcow2/qcow2"
)

// A Disk is one user's hold on the open image of a volume. All users of a
// volume share one image and see each other's writes. Close must come after all
// other uses have ended.
type Disk struct {
	// Image is the open image, read-write. The user does not close it.
	Image *qcow2.Image
	close func() error
}

// Open opens the volume id. The first user opens the image, and checks it when
// its last user did not close it: that may take longer than ctx allows, goes on
// then, and a retry finds it further. Errors: ErrNotFound, ErrBusy, ErrDamaged, ErrTooDeep,
// qcow2.ErrLocked, qcow2.ErrCorrupt.
func (p *Pool) Open(ctx context.Context, id string) (*Disk, error) {
	for {
		item, closing, err := p.joinLive(id)
		if err != nil {
			return nil, err
		}
		if closing == nil {
			im, err := p.images.await(ctx, id, item)
			if err != nil {
				return nil, err
			}
			return p.newDisk(id, im), nil
		}
		select {
		case <-closing:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// joinLive counts a user of the volume id unless it is deleted or being reverted,
// in one step: Delete sees either the tombstone or the user, Revert likewise.
func (p *Pool) joinLive(id string) (*sharedItem[*qcow2.Image], <-chan struct{}, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, ErrClosed
	}
	e := p.volumes[id]
	if e == nil || !e.live() {
		return nil, nil, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	}
	if e.reverting {
		return nil, nil, fmt.Errorf("%w: volume %s is being reverted", ErrBusy, id)
	}
	item, closing := p.images.join(id)
	return item, closing, nil
}

// openAny opens a volume for the pool itself, tombstone or not. The caller
// holds its ID lock.
func (p *Pool) openAny(ctx context.Context, id string) (*Disk, error) {
	im, err := p.images.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	return p.newDisk(id, im), nil
}

func (p *Pool) newDisk(id string, im *qcow2.Image) *Disk {
	return &Disk{Image: im, close: sync.OnceValue(func() error { return p.images.release(id) })}
}

// Close lets go of the volume. The last user closes the image.
func (d *Disk) Close() error { return d.close() }

// Written reports whether any cluster of the volume was ever written, in the
// image itself or in the chain under it.
func (d *Disk) Written(ctx context.Context) (bool, error) {
	for off, size := int64(0), d.Image.Size(); off < size; {
		e, err := d.Image.BlockStatus(ctx, off, size-off)
		if err != nil {
			return false, err
		}
		if e.Allocated && !e.Zero {
			return true, nil
		}
		off = e.End()
	}
	return false, nil
}
