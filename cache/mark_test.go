package cache

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"
)

// reopen opens the arena at path as a successor does, and the image id in it.
func reopen(t *testing.T, path string, f File, id [16]byte) (*Cache, *Handle) {
	t.Helper()
	c := newArenaCache(t, Options{Bytes: 64 * slotBytes, Path: path})
	return c, open(t, c, f, HandleOptions{ID: id, Classes: 3})
}

// TestFailureOutlivesTheProcess fails an image and kills the process, again and
// again: every successor is told, until one has closed the image.
func TestFailureOutlivesTheProcess(t *testing.T) {
	broken := errors.New("broken")
	id, neighbour := [16]byte{1}, [16]byte{2}
	for _, how := range []string{"sync", "write", "caller"} {
		t.Run(how, func(t *testing.T) {
			f := newRecorder(1 << 20)
			c, h := reopen(t, arenaPath(t), f, id)
			store(t, h, 2, 4096, 1, 7)
			store(t, open(t, c, newRecorder(1<<20), HandleOptions{ID: neighbour}), 0, 0, 0, 1)
			switch how {
			case "sync":
				f.onSync = func() error { return broken }
			case "write":
				f.onWrite = func([]byte, int64) error { return broken }
			case "caller":
				h.Fail(broken)
			}
			if err := h.WriteBack(); !errors.Is(err, broken) {
				t.Fatalf("WriteBack: %v", err)
			}
			path := kill(t, c)
			for range 2 {
				c, err := New(Options{Bytes: 64 * slotBytes, Path: path})
				if err != nil {
					t.Fatal(err)
				}
				if n, failed := c.Left(id); n != 1 || !failed {
					t.Errorf("left %d tables, failed %v: want 1, true", n, failed)
				}
				if n, failed := c.Left(neighbour); n != 1 || failed {
					t.Errorf("left of the neighbour %d tables, failed %v: want 1, false", n, failed)
				}
				next := kill(t, c)
				if err := c.Close(); err != nil {
					t.Error(err)
				}
				path = next
			}
			c, h = reopen(t, path, newRecorder(1<<20), id)
			if marked, whole := h.Marked(); !marked || !whole {
				t.Errorf("marked %v, whole %v: want true, true", marked, whole)
			}
			if got := load(t, h, 4096, 1); got != 7 {
				t.Errorf("the table that was dirty holds %d, want 7", got)
			}
			if err := h.Discard(); err != nil {
				t.Fatal(err)
			}
			_, h = reopen(t, kill(t, c), newRecorder(1<<20), id)
			if marked, _ := h.Marked(); marked || h.Adopted() != 0 {
				t.Errorf("after it was closed: marked %v, %d tables adopted", marked, h.Adopted())
			}
		})
	}
}

// TestForgetClearsTheMark drops what a predecessor left of a failed image that
// had nothing dirty, without opening it.
func TestForgetClearsTheMark(t *testing.T) {
	id := [16]byte{3}
	c, h := reopen(t, arenaPath(t), newRecorder(1<<20), id)
	h.Fail(errors.New("broken"))
	if err := c.Forget(id); err != nil {
		t.Fatal(err)
	}
	c = newArenaCache(t, Options{Bytes: 64 * slotBytes, Path: kill(t, c)})
	if us := c.Unclaimed(); len(us) != 1 || us[0] != (Unclaimed{ID: id, Failed: true}) {
		t.Fatalf("unclaimed: %+v: Forget of an open image must do nothing", us)
	}
	if err := c.Forget(id); err != nil {
		t.Fatal(err)
	}
	if us := c.Unclaimed(); len(us) != 0 {
		t.Errorf("unclaimed after Forget: %+v", us)
	}
}

// TestMarkOfDisplacedTables checks that a successor learns that dirty tables of
// a failed image are missing, at every step of the displacement and of a Discard.
func TestMarkOfDisplacedTables(t *testing.T) {
	id := [16]byte{1}
	stores := 0
	check := func() {}
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t), OnStore: func() { check() }})
	h := open(t, c, newRecorder(1<<20), HandleOptions{ID: id, Classes: 3})
	for i := range ways {
		store(t, h, Class(i%3), int64(i)*4096, i, uint64(i)+1)
	}
	h.Fail(errors.New("broken"))
	check = func() {
		stores++
		m := marks{arena: c.arena}
		k := m.of(id)
		entries, err := c.arena.dirtyEntries()
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) < ways && k == markFailed {
			t.Fatalf("store %d: %d of %d dirty tables, and the mark says that all are there", stores, len(entries), ways)
		}
		if len(entries) > 0 && k == markNone {
			t.Fatalf("store %d: %d dirty tables of a failed image, and no mark", stores, len(entries))
		}
	}
	get(t, open(t, c, newRecorder(1<<20), HandleOptions{ID: [16]byte{2}}), 0, 0).Unpin()
	if h.Stats().Displaced == 0 {
		t.Fatal("nothing was displaced")
	}
	if err := h.Discard(); err != nil {
		t.Fatal(err)
	}
	check = func() {}
	if stores < ways {
		t.Errorf("%d stores seen", stores)
	}
}

// TestMoreFailuresThanMarks fails more images than there are marks: none of
// them is taken for a healthy one.
func TestMoreFailuresThanMarks(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	var ids [][16]byte
	for i := range maxMarks + 5 {
		id := [16]byte{15: 1}
		binary.LittleEndian.PutUint32(id[:], uint32(i))
		ids = append(ids, id)
		open(t, c, newRecorder(0), HandleOptions{ID: id}).Fail(errors.New("broken"))
	}
	next := newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c)})
	for i, id := range ids {
		if marked, _ := open(t, next, newRecorder(0), HandleOptions{ID: id}).Marked(); !marked {
			t.Errorf("image %d of %d is not marked", i, len(ids))
		}
	}
}

// TestDamagedMarkIsRefused flips each bit of a mark.
func TestDamagedMarkIsRefused(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	open(t, c, newRecorder(0), HandleOptions{ID: [16]byte{1, 15: 1}}).Fail(errors.New("broken"))
	path := kill(t, c)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for bit := range markBytes * 8 {
		at := headerBytes + bit/8
		b[at] ^= 1 << (bit % 8)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		switch c, err := New(Options{Bytes: minBytes, Path: path}); {
		case errors.Is(err, ErrArena):
		case err == nil:
			// A failed image may turn into one that has also lost tables.
			if _, failed := c.Left([16]byte{1, 15: 1}); !failed {
				t.Errorf("bit %d: accepted, and the failure is forgotten", bit)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		default:
			t.Fatal(err)
		}
		b[at] ^= 1 << (bit % 8)
	}
}

// TestMarksWithoutNameEnd closes more failed images than there are marks: no image
// counts as failed for another's sake, and after the last none for a successor.
func TestMarksWithoutNameEnd(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	id := func(i int) [16]byte { return [16]byte{1, byte(i), byte(i >> 8)} }
	marked := func(c *Cache, id [16]byte) bool {
		h := open(t, c, newRecorder(0), HandleOptions{ID: id})
		marked, _ := h.Marked()
		if err := h.Discard(); err != nil {
			t.Error(err)
		}
		return marked
	}
	var failed []*Handle
	for i := range maxMarks + 5 {
		h := open(t, c, newRecorder(0), HandleOptions{ID: id(i)})
		h.Fail(errors.New("failed"))
		failed = append(failed, h)
	}
	if marked(c, id(9999)) {
		t.Error("an image is marked that has not failed")
	}
	for i := len(failed) - 1; i >= 0; i-- { // those without a mark of their own first
		if i == maxMarks-1 && !marked(newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c)}), id(9999)) {
			t.Error("a successor takes an image without a mark for sound")
		}
		if err := failed[i].Discard(); err != nil {
			t.Error(err)
		}
	}
	if marked(c, id(maxMarks+1)) {
		t.Error("an image that was closed is still marked")
	}
	if marked(newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c)}), id(maxMarks+1)) {
		t.Error("an image that was closed is marked for a successor")
	}
}
