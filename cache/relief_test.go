package cache

import (
	"testing"
	"time"
)

// TestRelieve writes back from one table above an eighth of the slots on.
func TestRelieve(t *testing.T) {
	f := newRecorder(0)
	h := open(t, newCache(t, 1<<20), f, HandleOptions{})
	const few = 1 << 20 / slotBytes / dirtyStop
	for i := range int64(few) {
		store(t, h, 0, i*slotBytes, 0, 1)
	}
	if err := h.Relieve(); err != nil || len(f.take()) > 0 || h.DirtyTables() != few {
		t.Errorf("with %d dirty tables: %v, %d dirty after", few, err, h.DirtyTables())
	}
	store(t, h, 0, few*slotBytes, 0, 1)
	if err := h.Relieve(); err != nil || h.DirtyTables() != 0 {
		t.Errorf("with %d dirty tables: %v, %d dirty after", few+1, err, h.DirtyTables())
	}
}

// TestMissWaitsForNoMoreThanItNeeds fills the only set with dirty tables of two
// classes and holds up the pass before the second: the table that misses finds
// room among those of the first.
func TestMissWaitsForNoMoreThanItNeeds(t *testing.T) {
	const class1 = 1 << 16
	f := newRecorder(1 << 20)
	h := open(t, newCache(t, minBytes), f, HandleOptions{Classes: 2})
	found := make(chan struct{})
	f.onWrite = func(_ []byte, off int64) error {
		if off < class1 {
			return nil
		}
		select {
		case <-found:
		case <-time.After(time.Minute):
			t.Error("a miss waits for the whole pass")
		}
		return nil
	}
	for i := range int64(ways / 2) {
		store(t, h, 0, i*slotBytes, 0, 1)
		store(t, h, 1, class1+i*slotBytes, 0, 1)
	}
	get(t, h, 0, ways*slotBytes).Unpin()
	close(found)
	writeBack(t, h)
}
