package volume

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A volume of CloneCopy is made as an overlay, in constant time, and used at once.
// The copier makes it independent in the background, one volume at a time:
//
//  1. It copies what the volume still shows of its source, while guests use it.
//     Now and then it makes the copy durable and the record say how far it is.
//  2. When nothing shows the source any more, neither the volume nor one of its
//     snapshots, the backing file name leaves the header of the image. That is
//     the commit: headers are what dependents are counted by.
//  3. The views of the volume are made anew, which named the backing file, too.
//  4. The record says that the volume is not pending, and the reaper removes
//     what the volume was the last dependent of.
//
// A process that dies on the way leaves a valid overlay. The next one goes on
// where the record says; what is allocated already costs it no copy. A snapshot
// taken on the way shows the source: it holds the link until it is deleted.

const (
	// copyRetry is how long the copier waits before it tries again what failed.
	copyRetry = 10 * time.Second
	// copyStep is how much is copied between two looks at the bandwidth, in bytes.
	copyStep = 1 << 20
	// copySave is how much is copied between two changes of the record, in bytes.
	copySave = 256 << 20
)

// A copyJob is what the copier does with one volume; guarded by Pool.mu.
type copyJob struct {
	paused  int           // who keeps it from beginning
	waiting bool          // for a snapshot to be deleted
	cancel  func()        // nil when it does not run
	ended   chan struct{} // closed when it has ended
	failed  bool          // its failure is what Health reports
}

// wakeCopier makes Run look for volumes to copy soon.
func (p *Pool) wakeCopier() { wake(p.copies) }

// CopyAll copies what volumes of CloneCopy still need, and makes them
// independent. It passes over those that somebody has paused or whose snapshots
// need the source; left reports that something failed.
func (p *Pool) CopyAll(ctx context.Context) (left bool, err error) {
	left, err = detach(ctx, p, func(poolCtx context.Context) (bool, error) {
		ctx, cancel := context.WithCancel(poolCtx)
		defer cancel()
		var errs []error
		for _, id := range p.sortedIDs() {
			if ctx.Err() != nil {
				break
			}
			if err := p.copyVolume(ctx, id); err != nil {
				errs = append(errs, fmt.Errorf("copy %s: %w", id, err))
			}
		}
		return len(errs) > 0, errors.Join(errs...)
	})
	return left || err != nil, err
}

// copyVolume makes the volume id independent if it is to be. That it was paused
// is no error.
func (p *Pool) copyVolume(ctx context.Context, id string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	e := p.beginCopy(id, cancel)
	if e == nil {
		return nil
	}
	err := p.copyEntry(ctx, e)
	p.mu.Lock()
	defer p.mu.Unlock()
	close(e.copy.ended)
	e.copy.cancel = nil
	if ctx.Err() != nil {
		return nil
	}
	if err != nil || e.copy.failed {
		e.copy.failed = err != nil
		delete(p.failures, id)
		if err != nil {
			p.failures[id] = fmt.Errorf("copy from its source: %w", err)
		}
	}
	return err
}

// beginCopy claims the volume id for the copier, or returns nil.
func (p *Pool) beginCopy(id string, cancel func()) *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.volumes[id]
	if p.closed || e == nil || e.rec == nil || e.rec.Deleted || !e.rec.Copy.Pending || e.copy.paused > 0 || e.copy.waiting ||
		e.copy.cancel != nil { // a CopyAll whose caller has left is at it
		return nil
	}
	e.copy.cancel, e.copy.ended = cancel, make(chan struct{})
	return e
}

// pauseCopy stops the copier at the volume id, which has let go of the image
// when it returns, and keeps it away until resume is called.
func (p *Pool) pauseCopy(id string) (resume func()) {
	p.mu.Lock()
	e := p.volumes[id]
	if e == nil {
		p.mu.Unlock()
		return func() {}
	}
	e.copy.paused++
	var ended chan struct{}
	if e.copy.cancel != nil {
		e.copy.cancel()
		ended = e.copy.ended
	}
	p.mu.Unlock()
	if ended != nil {
		<-ended
	}
	return func() {
		p.mu.Lock()
		e.copy.paused--
		pending := e.rec != nil && e.rec.Copy.Pending
		p.mu.Unlock()
		if pending {
			p.wakeCopier()
		}
	}
}

// setWaiting says whether the copier leaves e alone until a snapshot is deleted.
func (p *Pool) setWaiting(e *entry, waiting bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e.copy.waiting = waiting
}

// retryCopy lets the copier look at e again when it waited for a snapshot.
func (p *Pool) retryCopy(e *entry) {
	p.mu.Lock()
	waited := e.copy.waiting
	e.copy.waiting = false
	p.mu.Unlock()
	if waited {
		p.wakeCopier()
	}
}

// copyEntry makes e independent of its source.
func (p *Pool) copyEntry(ctx context.Context, e *entry) (err error) {
	p.mu.Lock()
	linked, state := e.backing != nil, e.rec.Copy
	p.mu.Unlock()
	if linked {
		// Whoever gives up an open leaves it to end by itself: who has paused the
		// copier would find the image in use still.
		d, err := p.openAny(context.WithoutCancel(ctx), e.id)
		if err != nil {
			return err
		}
		dropped, err := p.copyDisk(ctx, e, d, state)
		if err = errors.Join(err, d.Close()); err != nil || !dropped {
			return err
		}
	}
	if err := p.renewViews(ctx, e); err != nil {
		return err
	}
	return p.updateRecord(e, func(r *volumeRecord) { r.Copy.Pending = false })
}

// copyDisk copies and drops the link. It returns false when a snapshot holds it.
func (p *Pool) copyDisk(ctx context.Context, e *entry, d *Disk, state Copy) (dropped bool, err error) {
	for {
		before := state.Copied
		if err := p.populate(ctx, e, d, &state); err != nil {
			return false, err
		}
		// Before the look: a snapshot that goes behind it wakes the copier again.
		p.setWaiting(e, true)
		dropped, err := d.Image.DropBacking(ctx)
		if err == nil && !dropped && state.Copied == before {
			return false, nil
		}
		p.setWaiting(e, false)
		if err != nil {
			return false, err
		}
		if dropped {
			p.mu.Lock()
			p.countDependent(e, -1)
			e.backing = nil
			p.mu.Unlock()
			p.wakeReaper()
			return true, nil
		}
		// The record may have said too much: go over all of it, which copies nothing
		// when it did not.
		state.Done = 0
	}
}

// populate copies from state.Done to the end of the disk and keeps state.
func (p *Pool) populate(ctx context.Context, e *entry, d *Disk, state *Copy) error {
	pace := pacer{rate: p.opts.CopyBandwidth, begin: time.Now()}
	saved := *state
	for state.Done < d.Image.Size() {
		next, copied, err := d.Image.Populate(ctx, state.Done, copyStep)
		if err != nil {
			return spaceError(err)
		}
		state.Done = next
		state.Copied += copied
		if err := pace.wait(ctx, copied); err != nil {
			return err
		}
		if state.Copied-saved.Copied < copySave && next < d.Image.Size() {
			continue
		}
		if err := d.Image.Flush(); err != nil {
			return err
		}
		saved = *state
		if err := p.updateRecord(e, func(r *volumeRecord) { r.Copy = saved }); err != nil {
			return err
		}
	}
	return nil
}

// A pacer keeps a copy below rate bytes per second; 0 is no bound.
type pacer struct {
	rate  int64
	begin time.Time
	bytes int64
}

// due returns when the bytes so far may have been copied.
func (c *pacer) due() time.Time {
	return c.begin.Add(time.Duration(float64(c.bytes) / float64(c.rate) * float64(time.Second)))
}

// wait counts n bytes and waits until they are due.
func (c *pacer) wait(ctx context.Context, n int64) error {
	c.bytes += n
	if c.rate <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(time.Until(c.due()))
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A CopyProgress says how far the background copy of one volume is.
type CopyProgress struct {
	Volume  string
	Size    int64 // virtual size, bytes
	Done    int64 // bytes of it that do not need the source any more
	Copied  int64 // bytes that were copied
	Waiting bool  // everything is copied; a snapshot of the volume needs the source still
}

// Copies returns the volumes of CloneCopy that still need their source, in ID order.
func (p *Pool) Copies() []CopyProgress {
	ids := p.sortedIDs()
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []CopyProgress
	for _, id := range ids {
		if e := p.volumes[id]; e != nil && e.rec != nil && !e.rec.Deleted && e.rec.Copy.Pending {
			all = append(all, CopyProgress{id, e.rec.Size, e.rec.Copy.Done, e.rec.Copy.Copied, e.copy.waiting})
		}
	}
	return all
}
