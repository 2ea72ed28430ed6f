package cache

import (
	"errors"
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
