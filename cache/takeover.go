package cache

import (
	"fmt"
	"time"
)

// Taking over: a new process maps the arena of one that was killed. Every
// dirty slot is adopted where it is, by a handle without a file that keeps its
// way from being used for anything else, until Open for the same image claims it, or
// Forget drops it. A takeover changes nothing that another one could need: when
// it is killed, the next finds the same dirty tables.
//
// Clean and held slots become free: the file has the former, and the latter are
// part of an image that cannot be adopted.

// An entry is a directory entry of a dirty slot.
type entry struct {
	slot   slotIndex
	id     [16]byte
	off    int64
	length int
	class  Class
}

// dirtyEntries returns the entries of all dirty tables that can be adopted.
// An error says what is wrong with the directory; nothing of the arena is to be
// trusted then. It changes nothing.
func (a *arena) dirtyEntries() ([]entry, error) {
	var entries []entry
	lengths := map[[16]byte]int{}
	for i := range slotIndex(a.slots) {
		st := a.state(i)
		if !st.valid() {
			return nil, fmt.Errorf("slot %d: state %#x has the wrong parity", i, uint64(st))
		}
		if st.kind() != kindDirty {
			continue
		}
		e, err := a.entry(i)
		if err != nil {
			return nil, fmt.Errorf("slot %d: %w", i, err)
		}
		if e.id == [16]byte{} {
			continue // its handle had no identity: it is not for us
		}
		if n, ok := lengths[e.id]; ok && n != e.length {
			return nil, fmt.Errorf("slot %d: table of %d bytes, others of its image have %d", i, e.length, n)
		}
		lengths[e.id] = e.length
		for n := len(entries) - 1; n >= 0 && entries[n].slot/ways == i/ways; n-- {
			if entries[n].id == e.id && entries[n].off == e.off {
				return nil, fmt.Errorf("slots %d and %d: both hold the table at %#x of image %x", entries[n].slot, i, e.off, e.id)
			}
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// entry decodes and checks the entry of slot i, which is published.
func (a *arena) entry(i slotIndex) (entry, error) {
	if got, want := a.load(i, wordCheck), a.checkOf(i); got != want {
		return entry{}, fmt.Errorf("entry check %#x, want %#x", got, want)
	}
	if x, y := a.load(i, wordReserved), a.load(i, wordReserved+1); x|y != 0 {
		return entry{}, fmt.Errorf("reserved words %#x %#x, want 0", x, y)
	}
	off, length := a.load(i, wordOffset), a.load(i, wordLength)
	if !validSlice(length) {
		return entry{}, fmt.Errorf("table of %d bytes", length)
	}
	if off >= 1<<offsetBits || off%length != 0 {
		return entry{}, fmt.Errorf("table of %d bytes at %#x", length, off)
	}
	e := entry{slot: i, id: wordsID(a.load(i, wordID), a.load(i, wordID+1)), off: int64(off), length: int(length), class: a.state(i).class()}
	if want := setOf(seedOf(e.id), e.off, a.slots/ways); e.id != [16]byte{} && int(i/ways) != want {
		return entry{}, fmt.Errorf("table in set %d, want %d", i/ways, want)
	}
	return e, nil
}

// adopt gives the dirty slots to handles that wait to be claimed, and frees all
// others. Nobody else uses the cache yet.
func (c *Cache) adopt(entries []entry) error {
	next := 0
	for i := range slotIndex(c.arena.slots) {
		if next == len(entries) || entries[next].slot != i {
			if c.arena.state(i).kind() != kindFree {
				c.arena.unpublish(i)
			}
			continue
		}
		e := entries[next]
		next++
		h := c.unclaimed[e.id]
		if h == nil {
			h = newHandle(c, nil, HandleOptions{ID: e.id, SliceBytes: e.length, Classes: maxClasses})
			h.unclaimed.Store(true)
			if err := c.addLocked(h); err != nil {
				return err
			}
			c.unclaimed[e.id] = h
		}
		c.sets[i/ways].keys[i%ways].Store(uint64(h.key(e.off)))
		c.slots[i] = slot{off: e.off, item: noItem}
		h.dirty[e.class].push(c.slots, i)
		h.ndirty.Add(1)
		h.adopted++
		h.counters.tables.Add(1)
	}
	return nil
}

// Unclaimed is what a predecessor left of an image that is not open yet.
type Unclaimed struct {
	ID     [16]byte
	Tables int  // dirty ones
	Failed bool // a write or a sync of the image had failed
}

// Unclaimed lists the images of which a predecessor left something that waits
// for Open or Forget.
func (c *Cache) Unclaimed() []Unclaimed {
	c.mu.Lock()
	defer c.mu.Unlock()
	var us []Unclaimed
	for id, h := range c.unclaimed {
		us = append(us, Unclaimed{ID: id, Tables: h.DirtyTables(), Failed: c.marks.of(id) != markNone})
	}
	for _, id := range c.marks.all() {
		if c.unclaimed[id] == nil && !c.isOpenLocked(id) {
			us = append(us, Unclaimed{ID: id, Failed: true})
		}
	}
	return us
}

// Left reports whether a predecessor left something of the image id that waits
// for Open or Forget: dirty tables, or that the image had failed.
func (c *Cache) Left(id [16]byte) (tables int, failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isOpenLocked(id) {
		return 0, false
	}
	if h := c.unclaimed[id]; h != nil {
		tables = h.DirtyTables()
	}
	return tables, c.marks.of(id) != markNone
}

// Forget drops what a predecessor left of an image that is not open: its
// changes since the last pass are lost, as by a power loss, and that it had
// failed counts no more. It does nothing for an image that is open.
func (c *Cache) Forget(id [16]byte) error {
	c.mu.Lock()
	h := c.unclaimed[id]
	delete(c.unclaimed, id)
	if h == nil && !c.isOpenLocked(id) {
		c.marks.clear(id)
	}
	c.mu.Unlock()
	if h == nil {
		return nil
	}
	defer c.wakeUnclaimed()
	return h.Discard()
}

// awaitClaim returns what waits until an image whose tables fill set s is claimed or
// forgotten, and is ErrUnclaimed when that takes too long. s.mu is held.
func (c *Cache) awaitClaim(s *set) func() error {
	claimed := *c.claims.Load()
	for w := range s.keys {
		if k := key(s.keys[w].Load()); k == 0 || !c.owner(k).unclaimed.Load() {
			return func() error { return nil } // since the look
		}
	}
	return func() error {
		timer := time.NewTimer(time.Until(c.patience))
		defer timer.Stop()
		select {
		case <-claimed:
			return nil
		case <-timer.C:
			return ErrUnclaimed
		}
	}
}

// wakeUnclaimed wakes all who wait in awaitClaim; they look again.
func (c *Cache) wakeUnclaimed() {
	close(*c.claims.Swap(new(make(chan struct{}))))
}

// isOpenLocked reports whether the image id has an open handle.
func (c *Cache) isOpenLocked(id [16]byte) bool {
	for _, h := range c.handles {
		if h != nil && h.o.ID == id && !h.unclaimed.Load() {
			return true
		}
	}
	return false
}

// claimLocked gives h, which a takeover has made, to the opener of its image.
func (c *Cache) claimLocked(h *Handle, f File, o HandleOptions) error {
	if o.SliceBytes != h.o.SliceBytes {
		return fmt.Errorf("%w: slice of %d bytes: the tables that a predecessor left have %d", ErrInvalid, o.SliceBytes, h.o.SliceBytes)
	}
	for class := o.Classes; class < maxClasses; class++ {
		if h.dirty[class].n > 0 {
			return fmt.Errorf("%w: %d classes: a predecessor left tables of class %d", ErrInvalid, o.Classes, class)
		}
	}
	h.f, h.o = f, o
	delete(c.unclaimed, o.ID)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.unclaimed.Store(false)
	c.addDirty(h.DirtyTables())
	c.wakeUnclaimed()
	return nil
}

// Adopted returns the number of dirty tables that a predecessor had left for
// this image when it was opened. If it is 0, and the image is not Marked, the
// predecessor had written back everything.
func (h *Handle) Adopted() int { return h.adopted }

// Marked reports whether a predecessor's write or sync of this image had failed
// and it was not closed since: what clients were told is durable may not be.
// whole says that all changes since are among the adopted tables; without it
// there were more, and those are lost.
func (h *Handle) Marked() (marked, whole bool) { return h.mark != markNone, h.mark != markGone }
