package cache

import (
	"errors"
	"fmt"
	"io"
)

// vacateLocked finds a way of set s, number n, for a new table, and makes it
// free and sealed: an empty one, else by second chance one that is clean and
// not pinned. If there is none now, it returns what to call after unlocking
// s.mu, before the next try:
//
//   - a way is dirty and not pinned: a pass of its owner. If the owner has
//     failed, its table goes to its attic instead, at once, so that an image that
//     cannot be written back does not hold up the others;
//   - all ways are pinned or loading: wait for one. That ends, because nobody
//     waits for a way with a table pinned;
//   - all ways belong to images that are not open yet: wait for one of those, but
//     not for long (Options.ClaimWait).
func (c *Cache) vacateLocked(s *set, n int) (way int, retry func() error) {
	for w := range s.keys {
		if s.keys[w].Load() == 0 && s.sealLocked(w) {
			return w, nil
		}
	}
	var dirty *Handle
	var busy, unclaimed uint8
	for range 2 * ways {
		w := int(s.hand)
		s.hand = (s.hand + 1) % ways
		p := s.pins[w].Load()
		if p&(pinCount|pinSealed) != 0 {
			busy |= 1 << w
			continue
		}
		if s.keys[w].Load() == 0 {
			if s.sealLocked(w) {
				return w, nil
			}
			continue
		}
		i := slotIndex(n*ways + w)
		owner := c.owner(key(s.keys[w].Load()))
		if c.arena.state(i).dirty() {
			switch {
			case owner.unclaimed.Load():
				unclaimed |= 1 << w
			case owner.Err() == nil:
				dirty = owner
			default:
				busy |= 1 << w
				if s.sealLocked(w) {
					if owner.displace(i) {
						s.keys[w].Store(0)
						return w, nil
					}
					s.unsealLocked(w, 0)
				}
			}
			continue
		}
		if p&pinUsed != 0 {
			s.pins[w].And(^uint32(pinUsed))
			continue
		}
		busy |= 1 << w
		if !s.sealLocked(w) {
			continue
		}
		if !owner.evict(i) { // pinned, changed and unpinned since
			s.unsealLocked(w, 0)
			continue
		}
		s.keys[w].Store(0)
		return w, nil
	}
	if dirty != nil {
		return 0, func() error {
			// If the pass fails, the next try displaces.
			if errors.Is(dirty.makeRoom(), ErrClosed) {
				<-dirty.released
			}
			return nil
		}
	}
	if unclaimed == 1<<ways-1 {
		return 0, c.awaitClaim(s)
	}
	return 0, wait(s.awaitLocked(busy))
}

// evict forgets a clean table whose way is sealed; false if it is dirty.
func (h *Handle) evict(i slotIndex) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.c.arena.state(i).dirty() {
		return false
	}
	h.forgetLocked(i)
	h.counters.evictions.Add(1)
	return true
}

// beginLoad counts a load; false if the handle is closed.
func (h *Handle) beginLoad() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.loads++
	return true
}

// load fills the way of f, which is free and sealed, and returns it pinned.
func (h *Handle) load(class Class, off int64, s *set, n int, f *fill) (Table, error) {
	i := slotIndex(n*ways + f.way)
	dirty, err := h.read(i, off)

	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeFillLocked(f)
	f.err = err
	close(f.done)
	h.mu.Lock()
	if err == nil {
		h.publishLocked(i, class, off, dirty)
	}
	h.loads-- // Discard goes on, but not in this set
	if h.loads == 0 {
		h.quiet.Broadcast()
	}
	h.mu.Unlock()
	if err != nil {
		s.keys[f.way].Store(0)
		s.unsealLocked(f.way, 0)
		return Table{}, err
	}
	s.unsealLocked(f.way, 1)
	return h.table(i), nil
}

// read reads the table at off into slot i, which is free. If the table was
// displaced, it comes from the attic and is dirty.
func (h *Handle) read(i slotIndex, off int64) (dirty bool, err error) {
	p := h.c.arena.bytes(i, h.o.SliceBytes)
	if h.failure.Load() != nil { // else the attic is empty
		h.mu.Lock()
		ok := h.takeFromAtticLocked(p, off)
		h.mu.Unlock()
		if ok {
			return true, nil
		}
	}
	n, err := h.f.ReadAt(p, off)
	if n < len(p) {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		if !errors.Is(err, io.EOF) {
			return false, fmt.Errorf("cache: read table at %#x: %w", off, err)
		}
		clear(p[n:])
	}
	return false, nil
}

// publish gives slot i, whose content is complete and whose way is sealed, to
// the table at off. It returns false if the handle is closed.
func (h *Handle) publish(i slotIndex, class Class, off int64, dirty bool) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.publishLocked(i, class, off, dirty)
	return true
}

// publishLocked is publish for a handle that is not closed, or a load that it
// waits for.
func (h *Handle) publishLocked(i slotIndex, class Class, off int64, dirty bool) {
	a := h.c.arena
	a.describe(i, h.o.ID, off, h.o.SliceBytes)
	h.c.slots[i] = slot{off: off, item: noItem}
	kind := kindClean
	if dirty {
		kind = h.dirtyKindLocked()
		h.dirty[class].push(h.c.slots, i)
		h.addDirtyLocked(1)
	} else {
		h.clean.push(h.c.slots, i)
	}
	h.counters.tables.Add(1)
	a.setState(i, a.state(i).next(kind, class))
}

// forgetLocked takes slot i, whose way is sealed, from its table, and out of a
// running pass. The pass is not writing it.
func (h *Handle) forgetLocked(i slotIndex) {
	a := h.c.arena
	st := a.state(i)
	a.unpublish(i)
	sl := &h.c.slots[i]
	switch {
	case sl.item != noItem:
		h.items[sl.item].slot = noSlot
		sl.item = noItem
		h.addDirtyLocked(-1)
	case st.dirty():
		h.dirty[st.class()].remove(h.c.slots, i)
		h.addDirtyLocked(-1)
	default:
		h.clean.remove(h.c.slots, i)
	}
	h.counters.tables.Add(-1)
}

// makeDirty is the first store into a clean table, after the content. The
// state and the list change under one lock, so that a store which finds the
// table dirty already, and returns, is seen by every pass that starts then.
func (h *Handle) makeDirty(i slotIndex) {
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.c.arena
	for {
		s := a.state(i)
		if s.dirty() {
			if a.swapState(i, s, s.stored()) {
				return
			}
			continue
		}
		if a.swapState(i, s, s.as(h.dirtyKindLocked()).stored()) {
			h.clean.remove(h.c.slots, i)
			h.dirty[s.class()].push(h.c.slots, i)
			h.addDirtyLocked(1)
			return
		}
	}
}

// addDirtyLocked counts dirty tables. Those of a handle that has failed, or is not
// claimed, are not counted against the cache: no pass can clean them.
func (h *Handle) addDirtyLocked(n int) {
	h.ndirty.Add(int64(n))
	if h.failure.Load() == nil && !h.unclaimed.Load() {
		h.c.addDirty(n)
	}
}

// dirtyKindLocked returns the kind of a dirty table of h.
func (h *Handle) dirtyKindLocked() state {
	if h.attic.open() {
		return kindHeld
	}
	return kindDirty
}
