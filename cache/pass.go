package cache

import (
	"cmp"
	"fmt"
	"io"
	"slices"
)

// chunkTables bounds the copies of one class that a pass holds, to 4 MiB, and
// the time that it takes to sort them under the handle's lock.
const chunkTables = 1024

// How many tables a pass copies, and makes clean, before it lets others have
// the handle's lock.
const (
	copiesPerLock = 16
	cleansPerLock = 128
)

// An item is a dirty table in a pass: taken from its dirty list, copied,
// written and, after the next Datasync, made clean. Guarded by Handle.mu.
type item struct {
	off     int64
	slot    slotIndex // noSlot once the table was dropped
	class   Class
	writing bool
	copied  state // state word that the copy belongs to
}

// slotItemLocked returns the item of slot i in the running pass, nil if it has none.
func (h *Handle) slotItemLocked(i slotIndex) *item {
	if n := h.c.slots[i].item; n != noItem {
		return &h.items[n]
	}
	return nil
}

// Mark returns the number of the next pass to start. What was stored into
// tables before Mark was called is durable once Done returns that number or more.
func (h *Handle) Mark() uint64 { return h.started.Load() + 1 }

// Done returns the number of the last pass that succeeded.
func (h *Handle) Done() uint64 { return h.done.Load() }

// DirtyTables returns the number of table slices that the file does not have yet.
func (h *Handle) DirtyTables() int { return int(h.ndirty.Load()) }

// Err returns the first error of a write or a Datasync, or that of Fail, nil if
// there is none. It is sticky: a handle that has one writes nothing any more.
func (h *Handle) Err() error {
	if err := h.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// Fail makes the handle failed, as an error of a pass does, for a write or a
// Datasync of the caller that went wrong. A pass that is running goes on.
//
// When it returns, a successor will know (see Marked).
func (h *Handle) Fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.failLocked(err)
	h.cond.Broadcast()
}

// failLocked keeps the first error. Its dirty tables do not count any more: no
// pass can clean them.
func (h *Handle) failLocked(err error) {
	if h.failure.Load() != nil {
		return
	}
	// The mark comes first: whoever is told of the error may be told by a
	// successor that all is well otherwise.
	h.markLocked(markFailed)
	h.failure.Store(&err)
	h.c.addDirty(-h.DirtyTables())
}

func (h *Handle) markLocked(k markKind) {
	if h.o.ID != [16]byte{} && !h.closed {
		h.c.marks.set(h.o.ID, k)
	}
}

// cleanable reports whether a pass could clean tables of h.
func (h *Handle) cleanable() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.failure.Load() == nil && !h.closed && !h.unclaimed.Load()
}

// WriteBack runs one pass, or waits for the next if one is running, which it
// shares with all who wait. When it returns nil, all that was stored into
// tables, and all that was written to the file, before the call is durable.
// Otherwise it returns the first error of a pass of this handle: after one
// failure none succeeds, and the dirty tables stay dirty.
//
// A pass syncs once, and once more before each class above 0 that has dirty
// tables, if there is something to order before those.
func (h *Handle) WriteBack() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	want := h.Mark()
	for {
		switch {
		case h.failure.Load() != nil:
			return *h.failure.Load()
		case h.Done() >= want:
			return nil
		case h.closed:
			return ErrClosed
		case !h.running:
			h.startLocked()
		}
		h.cond.Wait()
	}
}

// Order makes what the caller has written to the file past the cache, before it
// calls, durable before any table of a class above 0 is written that it stores
// into later. Without it a pass that has nothing to write in the lower classes
// does not sync before it writes those of a higher one.
func (h *Handle) Order() {
	if !h.ordered.Load() {
		h.ordered.Store(true)
	}
}

// startLocked starts a pass; none is running.
func (h *Handle) startLocked() {
	h.running = true
	h.started.Add(1)
	h.wg.Add(1)
	go h.pass() // ends with the pass and the OnWriteBack calls due
}

// makeRoom sees to it that a pass is running, and waits until it has made some
// tables clean: who needs one way of a set need not wait for the whole pass, as
// WriteBack does, and for the next one too. With Options.OnStore it waits for the
// end, so that no pass goes on behind a call that has returned.
func (h *Handle) makeRoom() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.failure.Load() != nil:
		return *h.failure.Load()
	case h.closed:
		return ErrClosed
	case !h.running:
		h.startLocked()
	}
	whole := h.c.arena.onStore != nil
	for before := h.cleaned; h.running && (whole || h.cleaned == before); {
		h.cond.Wait()
	}
	return nil
}

// Relieve is for work that makes many tables dirty and that nobody waits for:
// when it has filled a part of the cache with them it writes back, and so stays
// out of the way of requests, which would wait for those passes otherwise.
//
// Preconditions: as for Get.
func (h *Handle) Relieve() error {
	if h.DirtyTables() <= len(h.c.slots)/dirtyStop {
		return nil
	}
	return h.WriteBack()
}

// pass runs one pass and reports it. It has a goroutine of its own because the
// one that asked for it can be anywhere below Get, with locks of its own that
// OnWriteBack takes too.
func (h *Handle) pass() {
	defer h.wg.Done()
	err := h.settle(Class(h.o.Classes - 1))
	if err == nil {
		err = h.sync(0)
	}
	for c, b := range h.bufs {
		putCopyBuffer(b)
		h.bufs[c] = nil
	}

	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.returnLocked(0)
		h.failLocked(err)
	} else {
		h.done.Store(h.started.Load())
	}
	h.running = false
	h.cond.Broadcast()
	if h.calling || h.o.OnWriteBack == nil {
		return
	}
	h.calling = true
	for h.notified < h.Done() {
		done := h.Done()
		h.notified = done
		h.mu.Unlock()
		h.o.OnWriteBack(done)
		h.mu.Lock()
	}
	h.calling = false
}

// settle writes all tables of class c and below that are dirty when it is
// called. Those of a higher class are copied before it is called, so what they
// depend on is among these. When it returns, the last writes wait for a sync.
//
// A class with more tables than fit in a chunk goes chunk by chunk, each with
// all the lower classes: several complete passes in one, in bounded memory.
// The items of a chunk lie above those of the higher classes in h.items.
func (h *Handle) settle(c Class) error {
	h.mu.Lock()
	left := h.dirty[c].n
	base := len(h.items)
	h.mu.Unlock()
	for first := true; first || left > 0; first = false {
		n := h.take(c, min(left, chunkTables))
		if n == 0 {
			left = 0 // the rest was dropped
		}
		left -= n
		h.copy(c, base, n)
		if c > 0 {
			if err := h.settle(c - 1); err != nil {
				return err
			}
		}
		if n == 0 {
			continue
		}
		if c > 0 {
			// The barrier: what the copies depend on, and the data that was
			// written before they were taken, is durable before they are written.
			// Order comes before the stores that need it: if the copies have such
			// a store, this pass sees the call, or an earlier sync has served it.
			if ordered := h.ordered.Swap(false); ordered || h.written {
				if err := h.sync(base + n); err != nil {
					return err
				}
			}
		}
		h.written = true
		if err := h.write(c, base, n); err != nil {
			return err
		}
		if left > 0 {
			if err := h.sync(base); err != nil {
				return err
			}
		}
	}
	return nil
}

// take moves up to n tables from the dirty list of class c to the end of
// h.items, and returns how many.
func (h *Handle) take(c Class, n int) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n = min(n, h.dirty[c].n)
	base := len(h.items)
	slots := h.c.slots
	for range n {
		i := h.dirty[c].head
		h.dirty[c].remove(slots, i)
		h.items = append(h.items, item{off: slots[i].off, slot: i, class: c})
	}
	chunk := h.items[base:]
	slices.SortFunc(chunk, func(a, b item) int { return cmp.Compare(a.off, b.off) })
	for k := range chunk {
		slots[chunk[k].slot].item = int32(base + k)
	}
	return n
}

// copy copies the tables of items [base, base+n) to the buffer of class c.
func (h *Handle) copy(c Class, base, n int) {
	size := h.o.SliceBytes
	if len(h.bufs[c]) < n*size {
		putCopyBuffer(h.bufs[c])
		h.bufs[c] = getCopyBuffer(n * size)
	}
	for k := 0; k < n; {
		// A drop, and the reuse of its slot, comes before or after the copy. The
		// lock is given up between a few tables, so that misses and stores are
		// not held up for long, and not after each: who takes a lock again and
		// again makes all others queue.
		h.mu.Lock()
		for end := min(k+copiesPerLock, n); k < end; k++ {
			if it := &h.items[base+k]; it.slot != noSlot {
				it.copied = h.c.arena.state(it.slot)
				h.c.arena.copyOut(h.bufs[c][k*size:(k+1)*size], it.slot)
			}
		}
		h.mu.Unlock()
	}
}

// write writes the copies of items [base, base+n), adjacent tables together.
func (h *Handle) write(c Class, base, n int) error {
	size := h.o.SliceBytes
	for k := 0; k < n; {
		from, to := h.beginWrite(base+k, base+n)
		k = to - base
		if from == to {
			continue
		}
		off := h.items[from].off // constant
		p := h.bufs[c][(from-base)*size : (to-base)*size]
		m, err := h.f.WriteAt(p, off)
		if err == nil && m < len(p) {
			err = io.ErrShortWrite
		}
		h.endWrite(from, to)
		if err != nil {
			return fmt.Errorf("cache: write table at %#x: %w", off, err)
		}
		h.counters.writes.Add(1)
	}
	return nil
}

// beginWrite returns the first run [from, to) of items in [lo, hi) that lie
// one after another in the file and were not dropped, marked as being written;
// from == to == hi if there is none.
func (h *Handle) beginWrite(lo, hi int) (from, to int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for lo < hi && h.items[lo].slot == noSlot {
		lo++
	}
	from, to = lo, lo
	for to < hi {
		it := &h.items[to]
		if it.slot == noSlot || it.off != h.items[from].off+int64(to-from)*int64(h.o.SliceBytes) {
			break
		}
		it.writing = true
		to++
	}
	return from, to
}

func (h *Handle) endWrite(from, to int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k := from; k < to; k++ {
		h.items[k].writing = false
	}
	h.quiet.Broadcast()
}

// sync makes durable what was written, and then the tables of the items from
// base on, which all have been, clean; but a table that was stored into since
// it was copied stays dirty, for the next pass.
func (h *Handle) sync(base int) error {
	if err := h.f.Datasync(); err != nil {
		return fmt.Errorf("cache: sync: %w", err)
	}
	h.counters.syncs.Add(1)
	h.written = false
	h.mu.Lock()
	defer h.mu.Unlock()
	a, slots := h.c.arena, h.c.slots
	for k := base; k < len(h.items); k++ {
		if (k-base)%cleansPerLock == cleansPerLock-1 {
			h.mu.Unlock() // what has been dealt with is in no item any more
			h.mu.Lock()
		}
		it := &h.items[k]
		if it.slot == noSlot || !a.swapState(it.slot, it.copied, it.copied.as(kindClean)) {
			continue
		}
		slots[it.slot].item = noItem
		h.clean.push(slots, it.slot)
		h.addDirtyLocked(-1)
		it.slot = noSlot
	}
	h.returnLocked(base)
	h.cleaned++
	h.cond.Broadcast()
	return nil
}

// returnLocked ends the items from base on; tables that are still in one go
// back to the dirty list.
func (h *Handle) returnLocked(base int) {
	for _, it := range h.items[base:] {
		if it.slot != noSlot {
			h.c.slots[it.slot].item = noItem
			h.dirty[it.class].push(h.c.slots, it.slot)
		}
	}
	h.items = h.items[:base]
}
