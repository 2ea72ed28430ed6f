package cache

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
)

// TestFailureIsSticky fails the n-th write or sync of a pass, for every n. The
// handle has failed from then on, nothing more is written, nothing dirty is
// forgotten.
func TestFailureIsSticky(t *testing.T) {
	broken := errors.New("broken")
	for n := range 6 { // 3 writes, 3 syncs
		for _, short := range []bool{false, true} {
			t.Run(fmt.Sprintf("operation %d, short %v", n, short), func(t *testing.T) {
				f := newRecorder(1 << 20)
				c := newCache(t, 1<<20)
				h := open(t, c, f, HandleOptions{Classes: 4})
				for i, class := range []Class{0, 2, 3} {
					store(t, h, class, int64(i)*4096, 0, uint64(i)+1)
				}
				ops, isWrite := 0, false
				fail := func(write bool) error {
					ops++
					if ops == n+1 {
						isWrite = write
						return broken
					}
					return nil
				}
				f.onWrite = func([]byte, int64) error { return fail(true) }
				f.onSync = func() error { return fail(false) }
				called := false
				h.o.OnWriteBack = func(uint64) { called = true }
				f.short = short

				err := h.WriteBack()
				if isWrite && short {
					if !errors.Is(err, io.ErrShortWrite) {
						t.Errorf("WriteBack: %v, want %v", err, io.ErrShortWrite)
					}
				} else if !errors.Is(err, broken) {
					t.Errorf("WriteBack: %v, want %v", err, broken)
				}
				if ops != n+1 {
					t.Errorf("%d operations, want none after the failed one, %d", ops, n+1)
				}
				for range 2 {
					if again := h.WriteBack(); again != err || h.Err() != err {
						t.Errorf("later WriteBack: %v, Err: %v, want the first error", again, h.Err())
					}
				}
				if ops != n+1 || called || h.Done() != 0 {
					t.Errorf("%d operations, OnWriteBack called %v, done %d after the failure", ops, called, h.Done())
				}
				if d := h.DirtyTables(); d+cleaned(n) != 3 {
					t.Errorf("%d dirty tables, want %d", d, 3-cleaned(n))
				}
				for i := range 3 {
					if got := load(t, h, int64(i)*4096, 0); got != uint64(i)+1 {
						t.Errorf("table %d: %d, want %d", i, got, i+1)
					}
				}
				if d := c.dirty.Load(); d != 0 {
					t.Errorf("%d dirty tables counted against the cache, want 0", d)
				}
				store(t, h, 0, 1<<16, 0, 7)
				if got := load(t, h, 1<<16, 0); got != 7 {
					t.Errorf("store into a failed image: %d, want 7", got)
				}
				if got := h.Close(); got == nil || !errors.Is(got, err) {
					t.Errorf("Close: %v, want the first error", got)
				}
			})
		}
	}
}

// cleaned returns how many of the three tables were durable before operation n
// of: write 0, sync, write 2, sync, write 3, sync.
func cleaned(n int) int { return n / 2 }

// TestFailedImageDoesNotBlockOthers fills the only set of the cache with dirty
// tables of an image that fails. Other images go on, durably; what the failed
// one had stored is still read back.
func TestFailedImageDoesNotBlockOthers(t *testing.T) {
	c := newCache(t, minBytes)
	bad, good := newRecorder(1<<20), newRecorder(1<<20)
	broken := errors.New("broken")
	bad.onSync = func() error { return broken }
	hb := open(t, c, bad, HandleOptions{Classes: 3, ID: [16]byte{1}})
	hg := open(t, c, good, HandleOptions{Classes: 3, ID: [16]byte{2}})
	for i := range ways {
		store(t, hb, Class(i%3), int64(i)*4096, i, uint64(i)+1)
	}
	for i := range 50 {
		store(t, hg, Class(i%3), int64(i)*4096, 0, uint64(i)+100)
	}
	if err := hb.Err(); !errors.Is(err, broken) {
		t.Fatalf("the image did not fail: %v", err)
	}
	writeBack(t, hg)
	for i := range 50 {
		if got := good.word(int64(i) * 4096); got != uint64(i)+100 {
			t.Errorf("table %d of the other image: %d, want %d", i, got, i+100)
		}
	}
	s := hb.Stats()
	if s.Displaced == 0 || s.DirtyTables != ways {
		t.Errorf("stats %+v, want %d dirty tables, some displaced", s, ways)
	}
	for i := range ways {
		if got := load(t, hb, int64(i)*4096, i); got != uint64(i)+1 {
			t.Errorf("table %d of the failed image: %d, want %d", i, got, i+1)
		}
		store(t, hb, Class(i%3), int64(i)*4096, i, uint64(i)+200)
		get(t, hg, 0, int64(i)*8192).Unpin()
	}
	for i := range c.slots {
		if k := c.arena.state(slotIndex(i)).kind(); k == kindDirty {
			t.Errorf("slot %d is dirty: a successor would find part of a failed image", i)
		}
	}
	for i := range ways {
		if got := load(t, hb, int64(i)*4096, i); got != uint64(i)+200 {
			t.Errorf("table %d of the failed image: %d, want %d", i, got, i+200)
		}
	}
	c.checkInvariants(t)
	hb.Drop(0)
	tab, err := hb.Create(1, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if got := tab.Load(1); got != 0 {
		t.Errorf("created table holds %d", got)
	}
	tab.Unpin()
	if n := hb.DirtyTables(); n != ways-1 {
		t.Errorf("%d dirty tables after a drop, want %d", n, ways-1)
	}
	if err := hb.Discard(); err != nil {
		t.Fatal(err)
	}
	if s := hb.Stats(); s.Tables != 0 || s.DirtyTables != 0 {
		t.Errorf("stats %+v after Discard, want no table", s)
	}
	for _, op := range bad.take() {
		if op != "w 0x0+4096" && op != "w 0x3000+4096" && op != "w 0x6000+4096" {
			t.Errorf("failed image: %s: only class 0 was written before its sync failed", op)
		}
	}
}

// TestFailedImageIsLeftFromTheTop looks at every state in which the process
// can be killed while a failed image is displaced, and while one is discarded: a
// successor finds no table of a class without all those of the classes below.
func TestFailedImageIsLeftFromTheTop(t *testing.T) {
	bad := [16]byte{1}
	perClass := [3]int{2, 3, 3}
	for _, end := range []string{"displaced", "discarded"} {
		states := 0
		var c *Cache
		var last [3]int
		look := func() {
			entries, err := newArena(slices.Clone(c.arena.mem), c.arena.slots).dirtyEntries()
			if err != nil {
				t.Fatal(err)
			}
			last = [3]int{}
			for _, e := range entries {
				if e.id == bad {
					last[e.class]++
				}
			}
			states++
			for class := 1; class < 3; class++ {
				if last[class] > 0 && last[class-1] < perClass[class-1] {
					t.Errorf("%s: a successor finds %v tables of each class, of %v", end, last, perClass)
				}
			}
		}
		watch := false
		c = newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t), OnStore: func() {
			if watch {
				look()
			}
		}})
		f := newRecorder(0)
		f.onWrite = func([]byte, int64) error { return io.ErrUnexpectedEOF }
		h := open(t, c, f, HandleOptions{ID: bad, Classes: 3})
		i := 0
		for class, n := range perClass {
			for range n {
				store(t, h, Class(class), int64(i)*4096, 0, 1)
				i++
			}
		}
		if err := h.WriteBack(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("WriteBack: %v, want the write's error", err)
		}
		look()
		if last != perClass {
			t.Errorf("a successor finds %v tables of the failed image, want %v", last, perClass)
		}
		watch = true
		if end == "displaced" {
			other := open(t, c, newRecorder(0), HandleOptions{ID: [16]byte{2}, Classes: 3})
			store(t, other, 0, 0, 0, 1)
			store(t, h, 2, 7*4096, 0, 2)
		} else if err := h.Discard(); err != nil {
			t.Fatal(err)
		}
		look()
		watch = false
		if last != [3]int{} || states < 8 {
			t.Errorf("%s: %d states, %v tables left in the last one, want none", end, states, last)
		}
	}
}
