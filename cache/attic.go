package cache

// An attic keeps dirty tables of a failed handle on the heap, by offset.
//
// After a failed write or sync nothing of an image is written any more, but its
// dirty tables are what its readers must see. In the arena they would hold
// their slots for ever, and an image whose tables fill a set would stop all
// others that hash there. So when another table needs the place, and only then,
// a table of a failed handle moves to its handle's attic; the next Get of it moves it
// back. An attic holds at most what the handle had dirty when it failed and what
// was stored since.
//
// The price: the first displacement ends the takeover of this image. A successor
// that found half of the dirty tables would not find a consistent image, so the
// tables that remain in the arena become held, in descending order of class: a
// kill in between leaves no table without those it depends on. The successor
// is told (Left): for it the image has suffered a power loss.
//
// Rejected: slots outside the arena for the neighbours (their acknowledged
// changes would not survive the process); forgetting the failed image's tables
// (its reads would go back in time); an error to the neighbours (they have done
// nothing wrong).
type attic map[int64][]byte

func (a attic) open() bool { return a != nil }

// displace moves a dirty table of h, which has failed, from slot i to the
// attic. The way is sealed. It returns false if the table is clean by now.
func (h *Handle) displace(i slotIndex) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.c.arena
	if !a.state(i).dirty() {
		return false
	}
	if !h.attic.open() {
		h.attic = attic{}
		h.markLocked(markGone)
		h.holdLocked()
	}
	if h.closed { // Discard is about to drop it, and has emptied the attic
		h.forgetLocked(i)
		return true
	}
	p := make([]byte, h.o.SliceBytes)
	a.copyOut(p, i)
	off := h.c.slots[i].off
	h.forgetLocked(i)
	h.attic[off] = p
	h.addDirtyLocked(1)
	h.counters.displaced.Add(1)
	return true
}

// holdLocked turns all dirty tables of h into held ones. No pass is running:
// the pass that failed has returned its tables to the lists.
func (h *Handle) holdLocked() {
	for c := maxClasses - 1; c >= 0; c-- {
		for i := h.dirty[c].head; i != noSlot; i = h.c.slots[i].next {
			for {
				s := h.c.arena.state(i)
				if h.c.arena.swapState(i, s, s.as(kindHeld)) {
					break
				}
			}
		}
	}
}

// takeFromAtticLocked moves the table at off to p; false if it is not there.
func (h *Handle) takeFromAtticLocked(p []byte, off int64) bool {
	b, ok := h.attic[off]
	if ok {
		copy(p, b)
		h.dropFromAtticLocked(off)
	}
	return ok
}

func (h *Handle) dropFromAtticLocked(off int64) {
	if _, ok := h.attic[off]; ok {
		delete(h.attic, off)
		h.addDirtyLocked(-1)
	}
}

func (h *Handle) emptyAtticLocked() {
	h.addDirtyLocked(-len(h.attic))
	clear(h.attic)
}
