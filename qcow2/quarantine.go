package qcow2

import (
	"sync"
	"time"
)

// quarantine holds the host clusters whose last guest reference went away, until
// it is safe to lower their refcounts: the table that dropped the reference is
// durable (E3, E8), and the requests that may still use the cluster have ended.
// Until then nothing can allocate or punch them.
//
// A crash loses the quarantine: its clusters are then leaks.
type quarantine struct {
	mu    sync.Mutex
	items []quarantined // guarded by mu; stamps never fall from first to last

	// reclaimMu is held by who lowers refcounts of what was in use, over the I/O:
	// of two that looked at a refcount of 2 at once, none would see the last
	// reference go. Requests only try it.
	reclaimMu sync.Mutex

	// A timer empties the quarantine of guests that discard and then do nothing
	// (Options.ReclaimAfter), and at once that of guests that never flush. It runs
	// in a goroutine of its own while armed.
	timer   *time.Timer    // nil when not armed; guarded by mu
	soon    bool           // the timer fires, or has fired, without a wait; guarded by mu
	stopped bool           // guarded by mu
	timers  sync.WaitGroup // one while armed
}

type quarantined struct {
	run
	pass  uint64 // number of the write back that makes the removal durable
	epoch uint64 // of the removal
	table bool   // clusters of a table: slices of them may be in the cache
}

// How many runs may wait before the quarantine is emptied in the background, and
// before a request does it by itself: it is one of many, and would wait for a
// pass and for all the runs.
const (
	manyQuarantined = 1024
	maxQuarantined  = 32768
)

// release gives up one reference to each of n clusters. The caller has stored
// the table entry that no longer names them.
func (im *Image) release(first hostCluster, n int64, table bool) {
	q := &im.quarantine
	q.mu.Lock()
	defer q.mu.Unlock()
	pass, epoch := im.handle.Mark(), im.epochs.now()
	if len(q.items) > 0 {
		last := &q.items[len(q.items)-1]
		if last.pass == pass && last.epoch == epoch && last.table == table && last.first+hostCluster(last.n) == first {
			last.n += n
			return
		}
	}
	q.items = append(q.items, quarantined{run{first, n}, pass, epoch, table})
	switch {
	case len(q.items) >= manyQuarantined:
		im.armLocked(0)
	case im.opts.ReclaimAfter > 0:
		im.armLocked(im.opts.ReclaimAfter)
	}
}

// armLocked starts the timer, or lets one that runs fire at once.
//
// Preconditions: q.mu is held.
func (im *Image) armLocked(after time.Duration) {
	q := &im.quarantine
	if q.stopped || q.soon {
		return
	}
	q.soon = after == 0
	if q.timer != nil {
		if q.soon && q.timer.Stop() {
			q.timer.Reset(0)
		}
		return
	}
	q.timers.Add(1)
	q.timer = time.AfterFunc(after, func() {
		defer q.timers.Done()
		// An error leaves leaks; the next Flush reports what is wrong with the file.
		if im.handle.WriteBack() == nil {
			_ = im.reclaimInTurn()
		}
		q.mu.Lock()
		q.timer, q.soon = nil, false
		if len(q.items) > 0 && im.opts.ReclaimAfter > 0 && im.handle.Err() == nil {
			im.armLocked(im.opts.ReclaimAfter)
		}
		q.mu.Unlock()
	})
}

// stopTimer keeps the timer from running any more, and waits for it.
func (q *quarantine) stopTimer() {
	q.mu.Lock()
	q.stopped = true
	if q.timer != nil && q.timer.Stop() {
		q.timers.Done() // it will not run
	}
	q.mu.Unlock()
	q.timers.Wait()
}

func (q *quarantine) size() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.items)
}

// reclaim lowers the refcounts of what may leave the quarantine. It returns at
// once when another goroutine is at it.
func (im *Image) reclaim() error {
	q := &im.quarantine
	if !q.reclaimMu.TryLock() {
		return nil
	}
	defer q.reclaimMu.Unlock()
	return im.reclaimLocked()
}

// reclaimInTurn is reclaim that waits for others who lower refcounts.
func (im *Image) reclaimInTurn() error {
	im.quarantine.reclaimMu.Lock()
	defer im.quarantine.reclaimMu.Unlock()
	return im.reclaimLocked()
}

// lower gives up a reference to each cluster of r at once: neither the file nor a
// request has it any more. table says that slices of them may be in the cache.
func (im *Image) lower(r run, table bool) error {
	im.quarantine.reclaimMu.Lock()
	defer im.quarantine.reclaimMu.Unlock()
	return im.reclaimRun(quarantined{run: r, table: table})
}

// reclaimLocked is reclaim with reclaimMu held.
func (im *Image) reclaimLocked() error {
	q := &im.quarantine
	for {
		q.mu.Lock()
		if len(q.items) == 0 || im.handle.Done() < q.items[0].pass || !im.epochs.passed(q.items[0].epoch) {
			q.mu.Unlock()
			return nil
		}
		item := q.items[0]
		q.items = q.items[1:]
		if len(q.items) == 0 {
			q.items = nil // the array it slid along
		}
		q.mu.Unlock()
		if err := im.reclaimRun(item); err != nil {
			return err // the rest of the run leaks
		}
	}
}

// reclaimRun lowers the refcounts of one run by 1. Clusters that fall to 0 are
// punched first: once they can be allocated, a punch would destroy new data.
//
// Preconditions: reclaimMu is held.
func (im *Image) reclaimRun(item quarantined) error {
	g := &im.geo
	for item.n > 0 {
		count, n, err := im.refcountRun(item.first, item.n)
		if err != nil {
			return err
		}
		last := count == 1
		if last { // in a broken image what is freed may be a table
			if err := im.checkUnguarded("cluster that is freed", g.hostOffset(item.first), n*g.clusterSize); err != nil {
				return err
			}
		}
		if last && im.packer.forget(g, item.first, n) {
			continue // more compressed data may have been put there since the look
		}
		if last && item.table { // who else refers to it may have changed it in the cache
			for off := g.hostOffset(item.first); off < g.hostOffset(item.first+hostCluster(n)); off += HostOffset(g.sliceBytes) {
				im.handle.Drop(int64(off))
			}
		}
		if last && im.opts.PassDiscard {
			// What the host cannot punch stays allocated there; nothing is lost.
			_ = im.f.Punch(int64(g.hostOffset(item.first)), n*g.clusterSize)
		}
		if err := im.addRefcounts(item.first, n, -1); err != nil {
			return err
		}
		if last {
			im.allocator.mu.Lock()
			im.allocator.rememberFreed(item.first, n)
			im.allocator.mu.Unlock()
		}
		item.first += hostCluster(n)
		item.n -= n
	}
	return nil
}

// reclaimIfMany bounds the quarantine for guests that discard or overwrite, never
// flush, and are faster than the timer. The caller is not inside a request.
func (im *Image) reclaimIfMany() {
	if im.quarantine.size() < maxQuarantined {
		return
	}
	if im.handle.WriteBack() == nil {
		// An error leaves leaks; the next Flush reports what is wrong with the file.
		_ = im.reclaim()
	}
}
