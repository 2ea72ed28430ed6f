package cache

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
)

func TestDropForgets(t *testing.T) {
	f := newRecorder(1 << 20)
	h := open(t, newCache(t, 1<<20), f, HandleOptions{})
	store(t, h, 0, 4096, 0, 1)
	get(t, h, 0, 8192).Unpin()
	h.Drop(4096)
	h.Drop(8192)
	h.Drop(12288) // not cached
	if h.DirtyTables() != 0 || h.Stats().Tables != 0 {
		t.Errorf("stats %+v after dropping all", h.Stats())
	}
	writeBack(t, h)
	if got := fmt.Sprint(f.take()); got != "[s]" {
		t.Errorf("operations %s: a dropped table was written", got)
	}
	if got := load(t, h, 4096, 0); got != 0 {
		t.Errorf("word = %d, want the file's 0", got)
	}
}

// TestDropOfCopiedTable drops a table that a running pass has copied and not
// yet written: Drop returns at once and the copy is not written, and the pass
// is right about what lies beside it.
func TestDropOfCopiedTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 3})
		for i := range 5 {
			store(t, h, 2, int64(i)*4096, 0, uint64(i)+1)
		}
		store(t, h, 0, 1<<16, 0, 9)
		g := make(gate)
		f.onSync = func() error { g.wait(); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { writeBack(t, h) })
		synctest.Wait() // in the barrier before class 2
		h.Drop(2 * 4096)
		// The cluster is reused for data, and for a table of another class.
		if _, err := f.WriteAt([]byte{0xaa}, 2*4096); err != nil {
			t.Fatal(err)
		}
		close(g)
		wg.Wait()
		want := "[w 0x10000+4096 w 0x2000+1 s w 0x0+8192 w 0x3000+8192 s]"
		if got := fmt.Sprint(f.take()); got != want {
			t.Errorf("operations %s, want %s", got, want)
		}
		if got := load(t, h, 2*4096, 0); got != 0xaa<<56 {
			t.Errorf("the reused cluster holds %#x", got)
		}
		if n := h.DirtyTables(); n != 0 {
			t.Errorf("%d dirty tables", n)
		}
	})
}

// TestDropOfTableBeingWritten drops a table whose write has begun: Drop waits
// for that write, and not for the pass.
func TestDropOfTableBeingWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, 1<<20), f, HandleOptions{})
		store(t, h, 0, 0, 0, 1)
		inWrite, inSync := make(gate), make(gate)
		f.onWrite = func([]byte, int64) error { inWrite.wait(); return nil }
		f.onSync = func() error { inSync.wait(); return nil }
		var pass, drop sync.WaitGroup
		pass.Go(func() { writeBack(t, h) })
		synctest.Wait()
		dropped := false
		drop.Go(func() { h.Drop(0); dropped = true })
		synctest.Wait()
		if dropped {
			t.Error("Drop did not wait for the write")
		}
		close(inWrite)
		synctest.Wait()
		if !dropped {
			t.Error("Drop waits for the pass")
		}
		close(inSync)
		pass.Wait()
		drop.Wait()
		if h.DirtyTables() != 0 || h.Stats().Tables != 0 {
			t.Errorf("stats %+v, want no table", h.Stats())
		}
	})
}

// TestCreateDuringPass replaces a table that a running pass has copied. What
// was created is dirty after the pass.
func TestCreateDuringPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 2})
		store(t, h, 1, 0, 0, 1)
		g := make(gate)
		f.onSync = func() error { g.wait(); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { writeBack(t, h) })
		synctest.Wait()
		tab, err := h.Create(0, 0)
		if err != nil {
			t.Fatal(err)
		}
		tab.Store(0, 2)
		tab.Unpin()
		close(g)
		wg.Wait()
		if got := fmt.Sprint(f.take()); got != "[s s]" {
			t.Errorf("operations %s: the replaced table was written", got)
		}
		if n := h.DirtyTables(); n != 1 {
			t.Errorf("%d dirty tables, want 1", n)
		}
		writeBack(t, h)
		if got := f.word(0); got != 2 {
			t.Errorf("file holds %d, want 2", got)
		}
	})
}

// TestDropWaitsForPinAndLoad drops a table that another has pinned, and one
// that is being loaded.
func TestDropWaitsForPinAndLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newRecorder(1 << 20)
		h := open(t, newCache(t, minBytes), f, HandleOptions{})
		tab := get(t, h, 0, 0)
		g := make(gate)
		f.onRead = func(int64) error { g.wait(); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { get(t, h, 0, 4096).Unpin() })
		synctest.Wait()
		n := 0
		wg.Go(func() { h.Drop(0); n++ })
		synctest.Wait()
		if n != 0 {
			t.Error("Drop did not wait for the pin")
		}
		tab.Store(0, 3)
		tab.Unpin()
		synctest.Wait()
		wg.Go(func() { h.Drop(4096); n++ })
		synctest.Wait()
		if n != 1 {
			t.Errorf("%d drops returned, want 1", n)
		}
		close(g)
		wg.Wait()
		if s := h.Stats(); s.Tables != 0 || s.DirtyTables != 0 {
			t.Errorf("stats %+v, want no table", s)
		}
	})
}
