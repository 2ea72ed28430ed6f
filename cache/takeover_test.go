package cache

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// arenaPath returns where a test puts its arena.
func arenaPath(t testing.TB) string { return filepath.Join(t.TempDir(), "arena") }

func newArenaCache(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// kill copies what a kill would leave of the arena of c now, and returns the
// path of the copy. The goroutines that change the arena are held up meanwhile.
func kill(t testing.TB, c *Cache) string {
	t.Helper()
	path := arenaPath(t)
	if err := os.WriteFile(path, c.arena.mem, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestTakeoverFindsDirtyTables(t *testing.T) {
	f := newRecorder(1 << 20)
	c := newArenaCache(t, Options{Bytes: 64 * slotBytes, Path: arenaPath(t), Generation: 3})
	o := HandleOptions{ID: [16]byte{1, 2, 3}, Classes: 3, SliceBytes: 1024}
	h := open(t, c, f, o)
	other := open(t, c, newRecorder(1<<20), HandleOptions{ID: [16]byte{9}})
	anonymous := open(t, c, newRecorder(1<<20), HandleOptions{})
	store(t, h, 0, 1024, 5, 1)
	store(t, h, 1, 2048, 0, 7) // written back below
	writeBack(t, h)
	store(t, h, 0, 1024, 6, 2)
	store(t, h, 2, 8192, 127, 3)
	get(t, h, 0, 4096).Unpin()
	store(t, other, 0, 0, 0, 4)
	store(t, anonymous, 0, 0, 0, 5)
	f.take()

	path := kill(t, c)
	for round := range 3 { // a takeover that is killed is taken over again
		c2, err := New(Options{Bytes: minBytes, Path: path, Generation: 3})
		if err != nil {
			t.Fatal(err)
		}
		if got := len(c2.slots); got != 64 {
			t.Errorf("the arena has %d slots, want the predecessor's 64", got)
		}
		us := c2.Unclaimed()
		slices.SortFunc(us, func(a, b Unclaimed) int { return a.Tables - b.Tables })
		want := []Unclaimed{{ID: [16]byte{9}, Tables: 1}, {ID: [16]byte{1, 2, 3}, Tables: 2}}
		if !slices.Equal(us, want) {
			t.Errorf("unclaimed %v, want %v", us, want)
		}
		path = kill(t, c2)
		if round < 2 {
			if err := c2.Close(); err != nil {
				t.Error(err)
			}
			continue
		}
		bad := o
		bad.SliceBytes = 512
		if _, err := c2.Open(f, bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open with another slice: %v, want ErrInvalid", err)
		}
		bad = o
		bad.Classes = 2
		if _, err := c2.Open(f, bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open with too few classes: %v, want ErrInvalid", err)
		}
		h2, err := c2.Open(f, o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c2.Open(f, o); !errors.Is(err, ErrInUse) {
			t.Errorf("second Open: %v, want ErrInUse", err)
		}
		if h2.Adopted() != 2 || h2.DirtyTables() != 2 {
			t.Errorf("adopted %d, dirty %d; want 2, 2", h2.Adopted(), h2.DirtyTables())
		}
		reads := f.reads
		for _, w := range []struct {
			off  int64
			i    int
			want uint64
		}{{1024, 5, 1}, {1024, 6, 2}, {8192, 127, 3}} {
			if got := load(t, h2, w.off, w.i); got != w.want {
				t.Errorf("table %#x word %d: %d, want %d", w.off, w.i, got, w.want)
			}
		}
		if f.reads != reads {
			t.Errorf("%d reads of adopted tables", f.reads-reads)
		}
		if got := load(t, h2, 2048, 0); got != 7 {
			t.Errorf("table that was written back: %d, want 7", got)
		}
		if err := h2.Close(); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); !slices.Equal(got, []string{"w 0x400+1024", "s", "w 0x2000+1024", "s"}) {
			t.Errorf("operations %v", got)
		}
		if err := c2.Forget([16]byte{9}); err != nil {
			t.Error(err)
		}
		if us := c2.Unclaimed(); len(us) != 0 {
			t.Errorf("unclaimed %v, want none", us)
		}
		if err := c2.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestArenaAfterCloseIsEmpty: an orderly end leaves nothing to take over, and
// the next arena has the size that is asked for.
func TestArenaAfterCloseIsEmpty(t *testing.T) {
	o := Options{Bytes: 16 * slotBytes, Path: arenaPath(t)}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	h, err := c.Open(newRecorder(0), HandleOptions{ID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	store(t, h, 0, 0, 0, 1)
	if err := errors.Join(h.Close(), c.Close()); err != nil {
		t.Fatal(err)
	}
	o.Bytes *= 2
	c = newArenaCache(t, o)
	if len(c.Unclaimed()) != 0 || len(c.slots) != 32 {
		t.Errorf("unclaimed %v, %d slots; want none, 32", c.Unclaimed(), len(c.slots))
	}
}

// takenOverFull returns a cache, with ClaimWait wait, whose killed predecessor left a set full of
// tables of one image, the file of that, and what opens it.
func takenOverFull(t *testing.T, wait time.Duration) (*Cache, *recorder, HandleOptions) {
	t.Helper()
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	f, o := newRecorder(0), HandleOptions{ID: [16]byte{1}}
	h := open(t, c, f, o)
	for i := range ways {
		store(t, h, 0, int64(i)*4096, 0, uint64(i)+1)
	}
	return newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c), ClaimWait: wait}), f, o
}

// TestUnclaimedTablesAreKept fills a set with tables of an image that is not
// open after the takeover: others get an error, not its place.
func TestUnclaimedTablesAreKept(t *testing.T) {
	c2, f, o := takenOverFull(t, 0)
	other := open(t, c2, newRecorder(0), HandleOptions{ID: [16]byte{2}})
	if _, err := other.Get(0, 0); !errors.Is(err, ErrUnclaimed) {
		t.Errorf("Get: %v, want ErrUnclaimed", err)
	}
	if _, err := other.Create(0, 0); !errors.Is(err, ErrUnclaimed) {
		t.Errorf("Create: %v, want ErrUnclaimed", err)
	}
	h2 := open(t, c2, f, o)
	get(t, other, 0, 0).Unpin() // writes back what was adopted
	for i := range ways {
		if got := load(t, h2, int64(i)*4096, 0); got != uint64(i)+1 {
			t.Errorf("table %d: %d, want %d", i, got, i+1)
		}
	}
}

// TestUnclaimedTablesAreWaitedFor does the same with a successor that says how long
// it takes to open its images: others wait until it has, or has forgotten one.
func TestUnclaimedTablesAreWaitedFor(t *testing.T) {
	for _, forget := range []bool{false, true} {
		c2, f, o := takenOverFull(t, time.Hour)
		other := open(t, c2, newRecorder(0), HandleOptions{ID: [16]byte{2}})
		s, n := c2.set(other.seed, 0)
		s.mu.Lock()
		_, wait := c2.vacateLocked(s, n) // as a Get that comes too early
		s.mu.Unlock()
		if forget {
			if err := c2.Forget(o.ID); err != nil {
				t.Error(err)
			}
		} else {
			open(t, c2, f, o)
		}
		if err := wait(); err != nil {
			t.Errorf("the wait for a way: %v", err)
		}
		get(t, other, 0, 0).Unpin()
	}
}

// TestForgottenTablesAreNotCounted forgets tables that a predecessor left: the
// background writer must not believe that fewer are dirty than are.
func TestForgottenTablesAreNotCounted(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	o := HandleOptions{ID: [16]byte{1}}
	h := open(t, c, newRecorder(0), o)
	for i := range 3 {
		store(t, h, 0, int64(i)*4096, 0, 1)
	}
	c2 := newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c)})
	if err := c2.Forget(o.ID); err != nil {
		t.Fatal(err)
	}
	if n := c2.dirty.Load(); n != 0 {
		t.Errorf("%d tables count as dirty, want 0", n)
	}
}
