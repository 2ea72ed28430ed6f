package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

func TestPassOrderAndSyncs(t *testing.T) {
	for _, tt := range []struct {
		name  string
		dirty map[Class][]int64
		want  string
	}{
		{"nothing", nil, "[s]"},
		{"class 0", map[Class][]int64{0: {8192}}, "[w 0x2000+4096 s]"},
		{"class 2", map[Class][]int64{2: {8192}}, "[s w 0x2000+4096 s]"},
		{"classes 0 and 2", map[Class][]int64{0: {8192}, 2: {0}}, "[w 0x2000+4096 s w 0x0+4096 s]"},
		{"classes 0, 2 and 3", map[Class][]int64{0: {8192}, 2: {0}, 3: {4096}},
			"[w 0x2000+4096 s w 0x0+4096 s w 0x1000+4096 s]"},
		{"all classes", map[Class][]int64{0: {0x3000}, 1: {0x2000}, 2: {0x1000}, 3: {0}},
			"[w 0x3000+4096 s w 0x2000+4096 s w 0x1000+4096 s w 0x0+4096 s]"},
		{"adjacent", map[Class][]int64{0: {0x5000, 0x1000, 0x2000, 0x8000, 0x4000}},
			"[w 0x1000+8192 w 0x4000+8192 w 0x8000+4096 s]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newRecorder(0)
			h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 4})
			for class, offs := range tt.dirty {
				for _, off := range offs {
					store(t, h, class, off, 0, uint64(off)+1)
				}
			}
			mark := h.Mark()
			writeBack(t, h)
			if got := fmt.Sprint(f.take()); got != tt.want {
				t.Errorf("operations %s, want %s", got, tt.want)
			}
			for _, offs := range tt.dirty {
				for _, off := range offs {
					if got := f.word(off); got != uint64(off)+1 {
						t.Errorf("file at %#x holds %d, want %d", off, got, off+1)
					}
				}
			}
			if h.DirtyTables() != 0 || h.Done() < mark {
				t.Errorf("%d dirty tables, done %d, mark %d", h.DirtyTables(), h.Done(), mark)
			}
			writeBack(t, h)
			if got := fmt.Sprint(f.take()); got != "[s]" {
				t.Errorf("second pass: %s, want one sync", got)
			}
		})
	}
}

// TestStoreDuringPass stores into a table at every stage of a pass. The pass
// does not clean it, and the next one writes it.
func TestStoreDuringPass(t *testing.T) {
	for _, stage := range []string{"write", "barrier", "last sync"} {
		synctest.Test(t, func(t *testing.T) {
			f := newRecorder(1 << 20)
			h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 2})
			store(t, h, 0, 0, 0, 1)
			store(t, h, 1, 4096, 0, 1)
			g := make(gate)
			syncs := 0
			f.onWrite = func(p []byte, off int64) error {
				if stage == "write" && off == 0 {
					g.wait()
				}
				return nil
			}
			f.onSync = func() error {
				syncs++
				if stage == "barrier" && syncs == 1 || stage == "last sync" && syncs == 2 {
					g.wait()
				}
				return nil
			}
			var wg sync.WaitGroup
			wg.Go(func() { writeBack(t, h) })
			synctest.Wait()
			store(t, h, 0, 0, 1, 2)
			store(t, h, 1, 4096, 1, 2)
			mark := h.Mark()
			close(g)
			wg.Wait()
			if h.Done() >= mark {
				t.Errorf("%s: done %d, mark %d: the pass had started before", stage, h.Done(), mark)
			}
			if n := h.DirtyTables(); n != 2 {
				t.Errorf("%s: %d dirty tables, want 2", stage, n)
			}
			if f.word(8) != 0 || f.word(4096+8) != 0 {
				t.Errorf("%s: the pass wrote what was stored after its copies", stage)
			}
			writeBack(t, h)
			if f.word(8) != 2 || f.word(4096+8) != 2 || h.Done() < mark {
				t.Errorf("%s: the next pass did not write the stores", stage)
			}
		})
	}
}

// TestPassIsShared counts passes: callers that arrive during one share the next.
func TestPassIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, 1<<20), f, HandleOptions{})
		g := make(gate)
		f.onSync = func() error { g.wait(); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { writeBack(t, h) })
		synctest.Wait()
		for i := range 20 {
			wg.Go(func() {
				store(t, h, 0, int64(i)*8192, 0, 1)
				writeBack(t, h)
			})
		}
		synctest.Wait()
		close(g)
		wg.Wait()
		if got := h.Stats(); got.Syncs != 2 || got.Passes != 2 || got.Writes != 20 {
			t.Errorf("stats %+v, want 2 syncs, 2 passes, 20 writes", got)
		}
	})
}

// TestHugePass writes more tables than a chunk holds: in every prefix of the
// operations, a table of class 1 is written only when all of class 0 that were
// dirty are durable, and memory is bounded.
func TestHugePass(t *testing.T) {
	const n = 2*chunkTables + 100
	f := newRecorder(0)
	h := open(t, newCache(t, 32*n*slotBytes), f, HandleOptions{Classes: 2})
	const class1 = int64(n) * 2 * slotBytes
	for i := range int64(n) {
		store(t, h, 0, i*2*slotBytes, 0, 1)
		store(t, h, 1, class1+i*slotBytes, 0, 1)
	}
	lowest, synced := 0, false
	largest := 0
	f.onWrite = func(p []byte, off int64) error {
		largest = max(largest, len(p))
		if off < class1 {
			lowest, synced = lowest+1, false
		} else if lowest != n || !synced {
			t.Errorf("class 1 at %#x written after %d of %d tables of class 0, synced %v", off, lowest, n, synced)
		}
		return nil
	}
	f.onSync = func() error { synced = true; return nil }
	writeBack(t, h)
	if largest != chunkTables*slotBytes {
		t.Errorf("largest write %d bytes, want %d", largest, chunkTables*slotBytes)
	}
	if h.DirtyTables() != 0 || len(f.data) != int(class1)+n*slotBytes {
		t.Errorf("%d dirty tables, file of %d bytes", h.DirtyTables(), len(f.data))
	}
	for c, b := range h.bufs {
		if b != nil {
			t.Errorf("class %d keeps %d bytes of buffer", c, len(b))
		}
	}
}

// TestOnWriteBackMayTakeCallersLocks evicts below a Get whose caller holds a
// lock that OnWriteBack takes.
func TestOnWriteBackMayTakeCallersLocks(t *testing.T) {
	f := newRecorder(1 << 20)
	var mu sync.Mutex
	var calls []uint64
	h, err := newCache(t, minBytes).Open(f, HandleOptions{OnWriteBack: func(done uint64) {
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, done)
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		mu.Lock()
		store(t, h, 0, int64(i)*4096, 0, 1)
		mu.Unlock()
	}
	if err := h.Close(); err != nil { // waits for the calls
		t.Fatal(err)
	}
	if len(calls) == 0 || !slices.IsSorted(calls) || calls[len(calls)-1] != h.Done() {
		t.Errorf("OnWriteBack got %v, last pass %d", calls, h.Done())
	}
}

func TestRunCleansBeforeSetsAreFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const slots = 1024
		f := newRecorder(0)
		c := newCache(t, slots*slotBytes)
		h := open(t, c, f, HandleOptions{})
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error, 1)
		go func() { stopped <- c.Run(ctx) }()
		for i := range slots / dirtyStart {
			store(t, h, 0, int64(i)*4096, 0, 1)
		}
		synctest.Wait()
		if n := h.DirtyTables(); n != slots/dirtyStart {
			t.Errorf("%d dirty tables below the threshold, want %d", n, slots/dirtyStart)
		}
		store(t, h, 0, slots*4096, 0, 1)
		synctest.Wait()
		if n := h.DirtyTables(); n > slots/dirtyStop {
			t.Errorf("%d dirty tables above the threshold, want %d at most", n, slots/dirtyStop)
		}
		cancel()
		if err := <-stopped; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v, want the cause of the context", err)
		}
	})
}

// TestPassInsideStore runs a whole pass just before each of the two stores into
// the arena that a Table.Store makes: of the content and of the state.
func TestPassInsideStore(t *testing.T) {
	for n := range 2 {
		var h *Handle
		left := -1
		c, err := New(Options{Bytes: minBytes, OnStore: func() {
			if left--; left == -1 {
				writeBack(t, h)
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		f := newRecorder(4096)
		if h, err = c.Open(f, HandleOptions{}); err != nil {
			t.Fatal(err)
		}
		tab := get(t, h, 0, 0)
		tab.Store(0, 1)
		left = n
		tab.Store(0, 2)
		tab.Unpin()
		if left >= 0 {
			t.Errorf("store %d was not reached", n)
		}
		if got := h.Stats().Passes; got != 1 {
			t.Errorf("%d passes, want 1", got)
		}
		writeBack(t, h)
		if got := f.word(0); got != 2 {
			t.Errorf("a pass before store %d: the file holds %d, want 2", n, got)
		}
		if err := errors.Join(h.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
}
