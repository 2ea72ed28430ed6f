package volume

import (
	"context"
	"fmt"
	"math"
)

// createFrom makes the volume of rec as a clone of its source. The caller holds
// its ID lock. The source's lock is held until the clone is published: only
// then does the clone's header keep the source from being removed.
func (p *Pool) createFrom(ctx context.Context, req CreateRequest, rec volumeRecord) (Volume, error) {
	if req.Source.Volume != "" && req.Source.Snapshot != "" {
		return Volume{}, fmt.Errorf("%w: both a volume and a snapshot as the source", ErrInvalid)
	}
	owner, err := p.sourceVolume(req.Source)
	if err != nil {
		return Volume{}, err
	}
	// The target is new, so nothing that holds the source can wait for it.
	unlock, err := p.locks.wait(ctx, owner.id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	reflink, err := p.mayReflink(owner, req.Params)
	if err != nil {
		return Volume{}, err
	}
	if !reflink {
		if err := p.checkDepth(owner.id); err != nil {
			return Volume{}, err
		}
	}
	snap, err := p.sourceSnapshot(ctx, req, rec)
	if err != nil {
		return Volume{}, err
	}
	if rec.Size, err = cloneSize(req.Size, snap.Size); err != nil {
		return Volume{}, err
	}
	rec.Filesystem = snap.Filesystem
	rec.Copy.Pending = req.Params.CloneMode == CloneCopy
	if reflink {
		return p.createReflink(ctx, rec, owner, snap)
	}
	view := viewRef{owner.id, snap.ID}
	if err := p.ensureView(ctx, view); err != nil {
		return Volume{}, err
	}
	v, err := p.build(ctx, rec, p.newImage(rec, &view))
	if err != nil {
		p.wakeReaper() // of the view and a hidden snapshot without a clone
	} else if rec.Copy.Pending {
		p.wakeCopier()
	}
	return v, err
}

// sourceVolume returns the entry of the volume whose image holds the source.
func (p *Pool) sourceVolume(s Source) (*entry, error) {
	if s.Snapshot != "" {
		e, _, err := p.snapshotRecord(s.Snapshot)
		return e, err
	}
	e, _, err := p.record(s.Volume)
	return e, err
}

// sourceSnapshot returns the snapshot to clone: the one asked for, or for the
// clone of a volume a hidden one, taken now unless an interrupted attempt took
// it. The caller holds the lock of the source volume.
func (p *Pool) sourceSnapshot(ctx context.Context, req CreateRequest, rec volumeRecord) (snapshotRecord, error) {
	if req.Source.Snapshot != "" {
		_, snap, err := p.snapshotRecord(req.Source.Snapshot)
		return snap, err
	}
	e, source, err := p.record(req.Source.Volume)
	if err != nil {
		return snapshotRecord{}, err
	}
	size, err := cloneSize(req.Size, source.Size)
	if err != nil {
		return snapshotRecord{}, err
	}
	// What will be refused shall not freeze the source before, nor make its writes
	// take new space: the caller repeats it for as long as the pool is full.
	kept, err := p.promise(size)
	if err != nil {
		return snapshotRecord{}, err
	}
	kept()
	snap, err := p.takeSnapshot(ctx, e, snapshotRecord{
		ID: p.hiddenID(rec.ID, e), Volume: e.id, Hidden: true, Filesystem: source.Filesystem,
	}, req.Quiesce)
	if err != nil {
		p.wakeReaper()
		return snapshotRecord{}, err
	}
	return *snap, nil
}

// hiddenID returns the ID of the hidden snapshot of e for the clone target. One of an
// earlier clone of the same ID may be needed still, by a reflink of that clone.
func (p *Pool) hiddenID(target string, e *entry) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := 0; ; n++ {
		id := p.makeID(kindHidden, target, n)
		if owner := p.snapshots[id]; (owner == nil || owner == e) && !p.neededLocked(e, id) {
			return id
		}
	}
}

// cloneSize picks the size of a clone of a source of the given size.
func cloneSize(r SizeRange, source int64) (int64, error) {
	if r.Required > 0 && r.Required < source {
		return 0, fmt.Errorf("%w: %d bytes asked for, the source has %d", ErrOutOfRange, r.Required, source)
	}
	return r.pick(source)
}

// checkDepth refuses a clone of the volume id that could not be opened any more.
func (p *Pool) checkDepth(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	source := id
	for depth := 1; depth < math.MaxInt; depth++ {
		e := p.volumes[id]
		if e == nil || e.backing == nil {
			return nil
		}
		if depth >= maxChainDepth {
			return fmt.Errorf("%w: volume %s is a clone of %d others, which is the limit; make one of them with cloneMode=copy or reflink, which begins anew",
				ErrTooDeep, source, maxChainDepth)
		}
		id = e.backing.Volume
	}
	return nil
}
