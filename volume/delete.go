package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Delete deletes the volume id. What its snapshots and their clones need stays
// on disk, hidden, until they are gone. Errors: ErrNotFound, ErrInUse, ErrBusy.
func (p *Pool) Delete(ctx context.Context, id string) error {
	return detachErr(ctx, p, func(ctx context.Context) error {
		if _, _, err := p.record(id); err != nil {
			return err
		}
		unlock, err := p.locks.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		defer p.pauseCopy(id)()
		e, err := p.bury(id)
		if err != nil {
			return err
		}
		// A volume that nobody needs goes by one rename, without a tombstone. That
		// takes no room: a pool that is full to the last byte can give some back.
		if p.wasteOf(e).volume {
			err = p.reapVolume(ctx, e)
		}
		if err == nil && p.find(id) == e {
			if err = p.updateRecord(e, func(r *volumeRecord) { r.Deleted = true }); err == nil {
				p.wakeReaper()
				return p.reapVolume(ctx, e)
			}
		}
		if err != nil && p.find(id) == e {
			p.unbury(e)
		}
		p.wakeReaper() // the volume may have been the last dependent of another
		return err
	})
}

// bury makes the volume id a tombstone in the index unless somebody uses it,
// in one step with joinLive.
func (p *Pool) bury(id string) (*entry, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.volumes[id]
	if e == nil || e.rec == nil || e.rec.Deleted {
		return nil, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	}
	if p.images.inUse(id) {
		return nil, fmt.Errorf("%w: volume %s is attached", ErrInUse, id)
	}
	rec := *e.rec
	rec.Deleted = true
	e.rec = &rec
	return e, nil
}

// unbury undoes bury when the tombstone could not be written.
func (p *Pool) unbury(e *entry) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rec := *e.rec
	rec.Deleted = false
	e.rec = &rec
}

// DeleteSnapshot deletes the snapshot id. Clones of it go on. The space is
// given back in the background. Errors: ErrNotFound, ErrBusy.
func (p *Pool) DeleteSnapshot(ctx context.Context, id string) error {
	return detachErr(ctx, p, func(ctx context.Context) error {
		e, _, err := p.snapshotRecord(id)
		if err != nil {
			return err
		}
		unlock, err := p.locks.lock(ctx, e.id)
		if err != nil {
			return err
		}
		defer unlock()
		_, rec, err := p.snapshotRecord(id)
		if err != nil {
			return err
		}
		if p.groupOf(rec) != "" {
			return fmt.Errorf("%w: snapshot %s is a member of the group snapshot %s; delete that", ErrInvalid, id, rec.Group)
		}
		rec.State = snapshotDeleted
		if err := p.putSnapshot(e, rec); err != nil {
			return err
		}
		p.wakeReaper()
		return nil
	})
}

// reapRetry is how long the reaper waits before it tries again what failed or
// was busy.
const reapRetry = 10 * time.Second

// Run removes what nothing needs any more, and copies what volumes of CloneCopy
// need still, until ctx ends. It is to be called once, after Open.
func (p *Pool) Run(ctx context.Context) {
	var copier sync.WaitGroup
	copier.Go(func() { p.repeat(ctx, p.copies, copyRetry, p.CopyAll) }) // ends as the reaper does
	p.repeat(ctx, p.kick, reapRetry, p.Reap)
	copier.Wait()
}

// repeat calls do at once, for what a predecessor left, then whenever kick says
// so, and again after retry when something was left, until ctx or the pool ends.
func (p *Pool) repeat(ctx context.Context, kick <-chan struct{}, retry time.Duration, do func(context.Context) (left bool, err error)) {
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.ctx.Done():
			return
		case <-kick:
		case <-again.C:
		}
		if left, err := do(ctx); left || err != nil {
			again.Reset(retry)
		}
	}
}

// wakeReaper makes Run look soon.
func (p *Pool) wakeReaper() { wake(p.kick) }

func wake(kick chan struct{}) {
	select {
	case kick <- struct{}{}:
	default: // nobody has looked since the last call
	}
}

// Reap removes every tombstone that nothing needs, and what interrupted
// creations left. It passes over busy volumes; left reports whether there were any.
func (p *Pool) Reap(ctx context.Context) (left bool, err error) {
	left, err = detach(ctx, p, func(ctx context.Context) (bool, error) {
		for {
			progress, busy, err := p.reapPass(ctx)
			if err != nil || !progress {
				return busy, errors.Join(err, p.reapGroups())
			}
		}
	})
	return left || err != nil, err
}

// reapPass goes once over all volumes. A removed clone can free its source, so
// progress asks for one more pass.
func (p *Pool) reapPass(ctx context.Context) (progress, busy bool, err error) {
	var errs []error
	for _, id := range p.sortedIDs() {
		if ctx.Err() != nil {
			return false, true, ctx.Err()
		}
		e := p.find(id)
		if e == nil || !p.reapable(e) {
			continue
		}
		unlock, ok := p.locks.tryReap(id)
		if !ok {
			busy = true
			continue
		}
		err := p.reapVolume(ctx, e)
		unlock()
		p.noteFailure(id, err)
		if err != nil {
			errs = append(errs, fmt.Errorf("reap %s: %w", id, err))
		} else {
			progress = true
		}
	}
	return progress, busy, errors.Join(errs...)
}

// waste is what of one volume nothing needs any more.
type waste struct {
	snapshots []string // to delete from the image
	views     []string // snapshots whose view to remove
	volume    bool     // the whole volume; snapshots and views are empty then
}

// wasteOf looks through the index; the caller holds the ID lock of e, or only
// wants a hint. A view that an image has open still, although its header does
// not name it any more (see CopyAll), is not waste yet.
func (p *Pool) wasteOf(e *entry) waste {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wasteLocked(e)
}

func (p *Pool) wasteLocked(e *entry) waste {
	if e.rec == nil || p.volumes[e.id] != e {
		return waste{}
	}
	var w waste
	kept := 0
	for id, rec := range e.snapshots {
		if rec.live() || p.neededLocked(e, id) {
			kept++
		} else {
			w.snapshots = append(w.snapshots, id)
		}
	}
	if e.rec.Deleted && kept == 0 && len(e.dependents) == 0 && !(p.blind && len(e.views) > 0) {
		return waste{volume: true}
	}
	for id := range e.views {
		if !p.neededLocked(e, id) {
			w.views = append(w.views, id)
		}
	}
	return w
}

// neededLocked reports whether an overlay may read the snapshot id of e. The
// caller holds p.mu.
func (p *Pool) neededLocked(e *entry, id string) bool {
	return e.dependents[id] > 0 || p.blind && e.views[id] || p.views.inUse(viewRef{e.id, id})
}

func (p *Pool) reapable(e *entry) bool {
	w := p.wasteOf(e)
	return w.volume || len(w.snapshots) > 0 || len(w.views) > 0
}

// claimWaste returns the waste of e, of which no view can be opened any more
// until settle is called.
func (p *Pool) claimWaste(e *entry) (w waste, settle func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// Who opens a view counts himself first and looks at going then. So either
	// he finds it going, or he is seen here.
	for id := range e.snapshots {
		e.going[id] = true
	}
	w = p.wasteLocked(e)
	for id := range e.snapshots {
		if !w.volume && !slices.Contains(w.snapshots, id) && !slices.Contains(w.views, id) {
			delete(e.going, id)
		}
	}
	return w, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		clear(e.going)
	}
}

// reapVolume removes the waste of e. The caller holds its ID lock.
func (p *Pool) reapVolume(ctx context.Context, e *entry) error {
	w, settle := p.claimWaste(e)
	defer settle()
	if w.volume {
		return p.removeVolume(e)
	}
	// A view goes before its snapshot: it must never show clusters that are free.
	for _, id := range w.views {
		if err := p.removeView(e, id); err != nil {
			return err
		}
	}
	if len(w.snapshots) == 0 {
		return nil
	}
	return p.removeSnapshots(ctx, e, w.snapshots)
}

// removeVolume takes the directory of e away in one step, then removes it.
func (p *Pool) removeVolume(e *entry) error {
	gone := incomingName(e.id)
	if err := p.dir.RemoveAll(gone); err != nil { // of a removal that failed
		return err
	}
	if err := p.dir.Rename(volumeDir(e.id), gone); err != nil {
		return err
	}
	p.mu.Lock()
	delete(p.volumes, e.id)
	delete(p.failures, e.id)
	for id := range e.snapshots {
		delete(p.snapshots, id)
	}
	p.countDependent(e, -1)
	p.mu.Unlock()
	return p.dir.RemoveAll(gone)
}

// removeSnapshots deletes snapshots from the image of e, then their records.
func (p *Pool) removeSnapshots(ctx context.Context, e *entry, ids []string) (err error) {
	d, err := p.openAny(ctx, e.id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	for _, id := range ids {
		if err := dropSnapshot(ctx, d.Image, id); err != nil {
			return fmt.Errorf("delete snapshot %s: %w", id, err)
		}
		if err := p.dir.Remove(snapshotRecName(e.id, id)); err != nil {
			return err
		}
		p.mu.Lock()
		delete(e.snapshots, id)
		delete(p.snapshots, id)
		p.mu.Unlock()
	}
	p.retryCopy(e) // it may have waited for them
	return nil
}
