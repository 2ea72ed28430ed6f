package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// Revert makes the volume id what it was when its snapshot was taken. All
// snapshots stay, later ones too. The size stays as well, for what is larger can
// not shrink in Kubernetes: a volume that has grown since grows again. It takes
// the time of a snapshot, whatever the size of the data.
//
// Errors: ErrNotFound, ErrInvalid (a snapshot of another volume), ErrInUse (the
// volume is attached), ErrBusy.
//
// The record names the snapshot first, then the image changes, then the record
// says what the volume is now. Who opens the image in between goes on from there
// (see openDurably), so that a crash leaves the old state or the new one. After an
// error that came before the image changed, the record says so no more: what is
// refused must not happen later, nor keep the volume from being used as it is.
func (p *Pool) Revert(ctx context.Context, id, snapshot string) (Volume, error) {
	return detach(ctx, p, func(ctx context.Context) (Volume, error) {
		if _, _, err := p.record(id); err != nil {
			return Volume{}, err
		}
		unlock, err := p.locks.lock(ctx, id)
		if err != nil {
			return Volume{}, err
		}
		defer unlock()
		owner, _, err := p.snapshotRecord(snapshot)
		if err != nil {
			return Volume{}, err
		}
		if owner.id != id {
			return Volume{}, fmt.Errorf("%w: snapshot %s is one of volume %s", ErrInvalid, snapshot, owner.id)
		}
		defer p.pauseCopy(id)()
		e, done, err := p.keepClosed(id)
		if err != nil {
			return Volume{}, err
		}
		defer done()
		if err := p.revert(ctx, e, snapshot); err != nil {
			return Volume{}, err
		}
		return p.Get(id)
	})
}

// keepClosed keeps users from opening the volume id until done is called,
// unless somebody uses it: in one step with joinLive.
func (p *Pool) keepClosed(id string) (e *entry, done func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e = p.volumes[id]
	if e == nil || e.rec == nil || e.rec.Deleted {
		return nil, nil, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	}
	if p.images.inUse(id) {
		return nil, nil, fmt.Errorf("%w: volume %s is attached; unstage it first", ErrInUse, id)
	}
	e.reverting = true
	return e, func() {
		p.mu.Lock()
		e.reverting = false
		p.mu.Unlock()
	}, nil
}

// revert is Revert with the ID lock of e held and nobody else using its image.
func (p *Pool) revert(ctx context.Context, e *entry, snapshot string) (err error) {
	// Opened before the record names the snapshot: what is wrong with the image
	// shows now, and opening it does not revert it.
	d, err := p.openAny(ctx, e.id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	before, err := p.activeTable(e.id)
	if err != nil {
		return err
	}
	if err := p.updateRecord(e, func(r *volumeRecord) { r.Revert, r.RevertFrom = snapshot, before }); err != nil {
		return err
	}
	return p.finishRevert(ctx, e, d.Image)
}

// activeTable returns where the header of the image of the volume id says that its
// active L1 table is: another place after each revert.
func (p *Pool) activeTable(id string) (uint64, error) {
	f, err := p.dir.OpenFile(path.Join(volumeDir(id), diskName), unix.O_RDONLY, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	h, err := readHeader(f)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(h[40:]), nil
}

// finishRevert reverts im, the image of e, as its record says. It can be repeated,
// unless it has failed before anything changed.
func (p *Pool) finishRevert(ctx context.Context, e *entry, im *qcow2.Image) error {
	err := p.applyRevert(ctx, e, im)
	if err == nil {
		return nil
	}
	err = spaceError(fmt.Errorf("revert volume %s: %w", e.id, err))
	p.mu.Lock()
	from := e.rec.RevertFrom
	p.mu.Unlock()
	if now, lookErr := p.activeTable(e.id); lookErr == nil && now == from {
		err = errors.Join(err, p.updateRecord(e, func(r *volumeRecord) { r.Revert, r.RevertFrom = "", 0 }))
	}
	return err
}

func (p *Pool) applyRevert(ctx context.Context, e *entry, im *qcow2.Image) error {
	p.mu.Lock()
	rec, snap := *e.rec, e.snapshots[e.rec.Revert]
	linked := e.backing != nil
	p.mu.Unlock()
	if snap == nil {
		return fmt.Errorf("%w: it is to be reverted to snapshot %s, which has no record", ErrDamaged, rec.Revert)
	}
	if err := im.ApplySnapshot(ctx, snap.ID); err != nil {
		return err
	}
	if im.Size() < rec.Size {
		if err := im.Resize(ctx, rec.Size); err != nil {
			return spaceError(err)
		}
	}
	return p.updateRecord(e, func(r *volumeRecord) {
		r.Revert, r.RevertFrom, r.Size, r.Filesystem = "", 0, im.Size(), snap.Filesystem
		if linked && r.Params.CloneMode == CloneCopy { // what the snapshot shows of the source is to be copied again
			r.Copy.Pending, r.Copy.Done = true, 0
		}
	})
}
