package cache

import (
	"runtime"
	"sync"
	"testing"
)

// TestLookupRacesReplacement replaces a way's key all the time. What a lookup
// has pinned holds its key, and goes on holding it.
func TestLookupRacesReplacement(t *testing.T) {
	const wanted, other = 7, 8
	var s set
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for k := uint64(wanted); ; k ^= wanted ^ other {
			select {
			case <-stop:
				return
			default:
			}
			s.mu.Lock()
			if s.sealLocked(5) {
				s.keys[5].Store(k)
				s.unsealLocked(5, 0)
			}
			s.mu.Unlock()
		}
	})
	for found, missed := 0, 0; found < 100_000; {
		w, ok := s.lookup(wanted)
		if !ok {
			if missed++; missed%1000 == 0 {
				runtime.Gosched() // the other may need the processor to go on
			}
			continue
		}
		found++
		if k := s.keys[w].Load(); w != 5 || k != wanted {
			t.Errorf("lookup of %d found way %d with key %d", wanted, w, k)
			break
		}
		s.unpin(w)
	}
	close(stop)
	wg.Wait()
}

// TestEvictLooksAgain: a table that became dirty after the clock chose it stays.
func TestEvictLooksAgain(t *testing.T) {
	h := open(t, newCache(t, minBytes), newRecorder(0), HandleOptions{})
	store(t, h, 0, 0, 0, 1)
	s, n := h.c.set(h.seed, 0)
	s.mu.Lock()
	w, _ := s.findLocked(h.key(0))
	if !s.sealLocked(w) {
		t.Fatal("the way is pinned")
	}
	evicted := h.evict(slotIndex(n*ways + w))
	s.unsealLocked(w, 0)
	s.mu.Unlock()
	if evicted {
		t.Fatal("a dirty table was evicted")
	}
	if got := load(t, h, 0, 0); got != 1 {
		t.Errorf("word = %d, want 1", got)
	}
}

// TestTablesInUseStay reads many tables once, through the one set that also
// holds some which are used all the time.
func TestTablesInUseStay(t *testing.T) {
	h := open(t, newCache(t, minBytes), newRecorder(0), HandleOptions{})
	const hot = 5
	for i := range 200 {
		for n := range hot {
			off := int64(n) * 4096
			tab, ok := h.TryGet(0, off)
			if !ok {
				if i > 0 {
					t.Fatalf("table %d in use was evicted by table %d", n, i)
				}
				tab = get(t, h, 0, off)
				tab.Unpin()
				tab = get(t, h, 0, off)
			}
			tab.Unpin()
		}
		get(t, h, 0, int64(hot+i)*4096).Unpin()
	}
}
