package cache

import (
	"errors"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

func TestHitDoesNotAllocate(t *testing.T) {
	h := open(t, newCache(t, 0), newRecorder(0), HandleOptions{})
	store(t, h, 0, 4096, 0, 1)
	if n := testing.AllocsPerRun(1000, func() {
		tab, err := h.Get(0, 4096)
		if err != nil {
			t.Fatal(err)
		}
		tab.Store(1, tab.Load(0)+1)
		tab.Unpin()
		if tab, ok := h.TryGet(0, 4096); ok {
			tab.Unpin()
		}
	}); n != 0 {
		t.Errorf("%v allocations per hit, want 0", n)
	}
}

// gate stops those who enter until it is opened.
type gate chan struct{}

func (g gate) wait() { <-g }

func TestLoadIsSharedAndHoldsNoLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		f.data[7] = 42
		c := newCache(t, minBytes) // one set: everything shares its lock
		h := open(t, c, f, HandleOptions{})
		store(t, h, 0, 8192, 0, 5)

		g := make(gate)
		f.onRead = func(off int64) error {
			if off == 0 {
				g.wait()
			}
			return nil
		}
		f.reads = 0
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if got := load(t, h, 0, 0); got != 42 {
					t.Errorf("loaded %d, want 42", got)
				}
			})
		}
		synctest.Wait() // all wait for the read
		if got := load(t, h, 8192, 0); got != 5 {
			t.Errorf("hit during a load: %d, want 5", got)
		}
		if got := load(t, h, 4096, 0); got != 0 {
			t.Errorf("load during a load: %d, want 0", got)
		}
		writeBack(t, h)
		if _, ok := h.TryGet(0, 0); ok {
			t.Error("TryGet found a table that is being loaded")
		}
		close(g)
		wg.Wait()
		if f.reads != 2 {
			t.Errorf("%d reads, want 2", f.reads)
		}
	})
}

func TestLoadErrorReachesAllAndIsNotCached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, minBytes), f, HandleOptions{})
		g, broken, calls := make(gate), errors.New("broken"), 0
		f.onRead = func(int64) error { g.wait(); calls++; return broken }
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if _, err := h.Get(0, 0); !errors.Is(err, broken) {
					t.Errorf("Get: %v, want the read's error", err)
				}
			})
		}
		synctest.Wait()
		close(g)
		wg.Wait()
		if calls != 1 {
			t.Errorf("%d reads, want 1", calls)
		}
		if s := h.Stats(); s.Tables != 0 {
			t.Errorf("%d tables cached after a failed load", s.Tables)
		}
		if err := h.Err(); err != nil {
			t.Errorf("a failed load made the handle failed: %v", err)
		}
		f.onRead = nil
		if got := load(t, h, 0, 0); got != 0 {
			t.Errorf("after the failure: %d, want 0", got)
		}
	})
}

// TestPinnedWaysAreWaitedFor fills the one set with pinned tables: a ninth Get
// waits until any is unpinned.
func TestPinnedWaysAreWaitedFor(t *testing.T) {
	for _, dirty := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newRecorder(1 << 20)
			h := open(t, newCache(t, minBytes), f, HandleOptions{})
			var pinned []Table
			for i := range ways {
				tab := get(t, h, 0, int64(i)*4096)
				if dirty {
					tab.Store(0, uint64(i)+1)
				}
				pinned = append(pinned, tab)
			}
			got := false
			var wg sync.WaitGroup
			wg.Go(func() { get(t, h, 0, 1<<16).Unpin(); got = true })
			synctest.Wait()
			if got {
				t.Fatal("Get evicted a pinned table")
			}
			for i, tab := range pinned {
				if want := uint64(i + 1); dirty && tab.Load(0) != want {
					t.Errorf("pinned table %d changed", i)
				}
			}
			pinned[3].Unpin()
			wg.Wait()
			if _, ok := h.TryGet(0, 3*4096); ok {
				t.Error("the unpinned table is still cached")
			}
			for i, tab := range pinned {
				if i != 3 {
					tab.Unpin()
				}
			}
		})
	}
}

func TestWords(t *testing.T) {
	f := newRecorder(1 << 20)
	h := open(t, newCache(t, 0), f, HandleOptions{SliceBytes: 512})
	tab := get(t, h, 0, 512)
	if got := tab.Len(); got != 64 {
		t.Errorf("%d words, want 64", got)
	}
	tab.SetWords(0, nil)
	tab.SetWords(64, nil)
	if n := h.DirtyTables(); n != 0 {
		t.Errorf("storing no words made %d tables dirty", n)
	}
	tab.Fill(0x0102030405060708)
	tab.SetWords(61, []uint64{1, 2, 3})
	got := make([]uint64, 4)
	tab.Words(got, 60)
	if want := []uint64{0x0102030405060708, 1, 2, 3}; !slices.Equal(got, want) {
		t.Errorf("words %#x, want %#x", got, want)
	}
	for name, f := range map[string]func(){
		"Load -1":      func() { tab.Load(-1) },
		"Load 64":      func() { tab.Load(64) },
		"Store 64":     func() { tab.Store(64, 0) },
		"Words 62":     func() { tab.Words(make([]uint64, 3), 62) },
		"Words -1":     func() { tab.Words(make([]uint64, 3), -1) },
		"SetWords 62":  func() { tab.SetWords(62, make([]uint64, 3)) },
		"SetWords -1":  func() { tab.SetWords(-1, make([]uint64, 3)) },
		"SetWords max": func() { tab.SetWords(math.MaxInt, make([]uint64, 3)) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			f()
		}()
	}
	tab.Unpin()
	writeBack(t, h)
	if got := f.data[512 : 512+8]; !slices.Equal(got, []byte{1, 2, 3, 4, 5, 6, 7, 8}) {
		t.Errorf("file holds % x: not big endian", got)
	}
}
