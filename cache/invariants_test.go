package cache

import (
	"os"
	"slices"
	"testing"
)

// awaitQuiet waits until no pass runs: one can outlast the calls that began it.
func (c *Cache) awaitQuiet() {
	c.mu.Lock()
	handles := slices.Clone(c.handles[1:])
	c.mu.Unlock()
	for _, h := range handles {
		if h != nil {
			h.mu.Lock()
			h.awaitQuietLocked()
			h.mu.Unlock()
		}
	}
}

// checkInvariants compares what the sets, the slots, the lists and the
// directory say about each other. Nobody uses the cache meanwhile. The numbers
// are those of the package comment.
func (c *Cache) checkInvariants(t *testing.T) {
	t.Helper()
	c.awaitQuiet()
	c.mu.Lock()
	defer c.mu.Unlock()
	seen := map[key]bool{}
	tables := map[int]int{}
	for i := range c.slots {
		slot := slotIndex(i)
		s, w := &c.sets[i/ways], i%ways
		k, st := key(s.keys[w].Load()), c.arena.state(slot)
		if p := s.pins[w].Load(); p&(pinCount|pinSealed) != 0 {
			t.Errorf("slot %d: pin word %#x", i, p)
		}
		if !st.valid() {
			t.Errorf("slot %d: state %#x has the wrong parity", i, uint64(st))
		}
		if (k == 0) != (st.kind() == kindFree) {
			t.Errorf("slot %d: key %#x, state %#x", i, k, uint64(st))
		}
		if k == 0 {
			continue
		}
		if seen[k] {
			t.Errorf("slot %d: its table has another slot too (1)", i)
		}
		seen[k] = true
		tables[k.handle()]++
		h := c.handles[k.handle()]
		if _, n := c.set(h.seed, k.offset()); n != i/ways {
			t.Errorf("slot %d: its table belongs to set %d", i, n)
		}
		e, err := c.arena.entry(slot)
		if err != nil && h.o.ID != [16]byte{} {
			t.Errorf("slot %d: %v (4)", i, err)
		}
		if off := k.offset(); c.slots[i].off != off || err == nil && (e.off != off || e.id != h.o.ID || e.length != h.o.SliceBytes) {
			t.Errorf("slot %d: key says %#x of %x, slot %#x, entry %+v (4)", i, off, h.o.ID, c.slots[i].off, e)
		}
		if h.attic[k.offset()] != nil {
			t.Errorf("slot %d: its table is in the attic too (1)", i)
		}
	}
	for n, h := range c.handles {
		if h == nil {
			continue
		}
		listed, dirty := h.checkList(t, &h.clean, false, 0), 0
		for class := range h.dirty {
			dirty += h.checkList(t, &h.dirty[class], true, Class(class))
		}
		if listed+dirty != tables[n] || int64(tables[n]) != h.counters.tables.Load() {
			t.Errorf("handle %d: %d tables in slots, %d clean and %d dirty in lists, %d counted (6)", n, tables[n], listed, dirty, h.counters.tables.Load())
		}
		if got := h.DirtyTables(); got != dirty+len(h.attic) {
			t.Errorf("handle %d: %d dirty tables counted, %d listed, %d in the attic", n, got, dirty, len(h.attic))
		}
	}
}

// checkList checks one list of h and returns its length.
func (h *Handle) checkList(t *testing.T, l *list, dirty bool, class Class) int {
	t.Helper()
	n, prev := 0, noSlot
	for i := l.head; i != noSlot; prev, i = i, h.c.slots[i].next {
		st, k := h.c.arena.state(i), key(h.c.sets[i/ways].keys[i%ways].Load())
		if st.dirty() != dirty || dirty && st.class() != class || k.handle() != h.number {
			t.Errorf("slot %d of handle %d: state %#x in the wrong list (6)", i, k.handle(), uint64(st))
		}
		if h.c.slots[i].prev != prev || h.c.slots[i].item != noItem {
			t.Errorf("slot %d: links %+v", i, h.c.slots[i])
		}
		if n++; n > l.n {
			break
		}
	}
	if n != l.n || l.tail != prev {
		t.Errorf("list of handle %d: %d slots, %d counted", h.number, n, l.n)
	}
	return n
}

// FuzzArena takes over arenas with a right header and any directory. It either
// refuses one or has a cache that works.
func FuzzArena(f *testing.F) {
	c, err := New(Options{Bytes: minBytes})
	if err != nil {
		f.Fatal(err)
	}
	for i := range 3 {
		h, err := c.Open(zeroFile{}, HandleOptions{ID: [16]byte{byte(i)}, Classes: 3})
		if err != nil {
			f.Fatal(err)
		}
		for class := range Class(3) {
			store(f, h, class, int64(class)*4096, 0, 1)
		}
	}
	f.Add(c.arena.mem[headerSize : headerSize+ways*entryBytes])
	f.Add([]byte{})
	boot, err := readBootID()
	if err != nil {
		f.Fatal(err)
	}
	path := arenaPath(f)
	f.Fuzz(func(t *testing.T, dir []byte) {
		_, size := arenaLayout(ways)
		b := make([]byte, size)
		head := header{slots: ways, bootID: boot}
		head.encode(b)
		copy(b[headerSize:headerSize+ways*entryBytes], dir)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := New(Options{Path: path, Bytes: minBytes})
		if err != nil {
			return
		}
		c.checkInvariants(t)
		for _, u := range c.Unclaimed() {
			h := c.unclaimed[u.ID]
			o := HandleOptions{ID: u.ID, SliceBytes: h.o.SliceBytes, Classes: maxClasses}
			if h, err = c.Open(zeroFile{}, o); err != nil {
				t.Fatal(err)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
		c.checkInvariants(t)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
}
