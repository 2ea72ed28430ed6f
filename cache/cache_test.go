package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(loadDirEnv); dir != "" {
		if err := runLoad(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

// A recorder is a File in memory that records what is done to it and can fail.
type recorder struct {
	mu    sync.Mutex
	data  []byte
	log   []string // "w OFF+LEN" and "s"
	reads int

	short bool // a write that fails is reported as short

	onRead  func(off int64) error           // called without mu, before the read
	onWrite func(p []byte, off int64) error // called without mu, before the write
	onSync  func() error                    // called without mu
}

func newRecorder(size int) *recorder { return &recorder{data: make([]byte, size)} }

func (r *recorder) ReadAt(p []byte, off int64) (int, error) {
	if r.onRead != nil {
		if err := r.onRead(off); err != nil {
			return 0, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reads++
	if off >= int64(len(r.data)) {
		return 0, io.EOF
	}
	n := copy(p, r.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	if r.onWrite != nil {
		if err := r.onWrite(p, off); err != nil {
			if r.short {
				return len(p) - 1, nil
			}
			return 0, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if need := int(off) + len(p); need > len(r.data) {
		r.data = append(r.data, make([]byte, need-len(r.data))...)
	}
	copy(r.data[off:], p)
	r.log = append(r.log, fmt.Sprintf("w %#x+%d", off, len(p)))
	return len(p), nil
}

func (r *recorder) Datasync() error {
	if r.onSync != nil {
		if err := r.onSync(); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.log = append(r.log, "s")
	return nil
}

// take returns the log and empties it.
func (r *recorder) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}

// word returns the big-endian word at off.
func (r *recorder) word(off int64) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var v uint64
	for _, b := range r.data[off : off+8] {
		v = v<<8 | uint64(b)
	}
	return v
}

func newCache(t testing.TB, bytes int64) *Cache {
	t.Helper()
	c, err := New(Options{Bytes: bytes})
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

// open opens a handle that is discarded at the end of the test.
func open(t testing.TB, c *Cache, f File, o HandleOptions) *Handle {
	t.Helper()
	h, err := c.Open(f, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Discard(); err != nil {
			t.Error(err)
		}
	})
	return h
}

func get(t testing.TB, h *Handle, class Class, off int64) Table {
	t.Helper()
	tab, err := h.Get(class, off)
	if err != nil {
		t.Fatal(err)
	}
	return tab
}

// store sets word i of the table at off.
func store(t testing.TB, h *Handle, class Class, off int64, i int, v uint64) {
	t.Helper()
	tab := get(t, h, class, off)
	tab.Store(i, v)
	tab.Unpin()
}

// load returns word i of the table at off.
func load(t testing.TB, h *Handle, off int64, i int) uint64 {
	t.Helper()
	tab := get(t, h, 0, off)
	defer tab.Unpin()
	return tab.Load(i)
}

func writeBack(t testing.TB, h *Handle) {
	t.Helper()
	if err := h.WriteBack(); err != nil {
		t.Fatal(err)
	}
}

func TestGetReadsOnce(t *testing.T) {
	f := newRecorder(1 << 20)
	f.data[4096+15] = 7
	h := open(t, newCache(t, 1<<20), f, HandleOptions{})
	for range 3 {
		if got := load(t, h, 4096, 1); got != 7 {
			t.Errorf("word 1 = %d, want 7", got)
		}
	}
	if f.reads != 1 {
		t.Errorf("%d reads, want 1", f.reads)
	}
	s := h.Stats()
	if s.Hits != 2 || s.Misses != 1 || s.Tables != 1 {
		t.Errorf("stats %+v, want 2 hits, 1 miss, 1 table", s)
	}
}

func TestTryGetDoesNoIO(t *testing.T) {
	f := newRecorder(1 << 20)
	h := open(t, newCache(t, 1<<20), f, HandleOptions{})
	if _, ok := h.TryGet(0, 8192); ok || f.reads != 0 {
		t.Errorf("TryGet of an uncached table: ok %v, %d reads", ok, f.reads)
	}
	get(t, h, 0, 8192).Unpin()
	tab, ok := h.TryGet(0, 8192)
	if !ok {
		t.Fatal("TryGet of a cached table: not found")
	}
	tab.Unpin()
}

func TestReadBeyondEndIsZero(t *testing.T) {
	f := newRecorder(4096 + 8)
	f.data[4096+7] = 9
	h := open(t, newCache(t, 1<<20), f, HandleOptions{})
	if got := load(t, h, 4096, 0); got != 9 {
		t.Errorf("last word of the file = %d, want 9", got)
	}
	if got := load(t, h, 4096, 1); got != 0 {
		t.Errorf("word beyond the end = %d, want 0", got)
	}
	if got := load(t, h, 1<<30, 5); got != 0 {
		t.Errorf("table beyond the end: %d, want 0", got)
	}
}

func TestArgumentsAreChecked(t *testing.T) {
	for _, o := range []HandleOptions{{SliceBytes: 8192}, {SliceBytes: 256}, {SliceBytes: 1000}, {Classes: 5}, {Classes: -1}} {
		c := newCache(t, 0)
		if _, err := c.Open(newRecorder(0), o); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open(%+v): %v, want ErrInvalid", o, err)
		}
	}
	for _, n := range []int64{-1, 1, minBytes - 1, maxBytes + 1} {
		if _, err := New(Options{Bytes: n}); !errors.Is(err, ErrInvalid) {
			t.Errorf("New with %d bytes: %v, want ErrInvalid", n, err)
		}
	}
	h := open(t, newCache(t, 0), newRecorder(0), HandleOptions{SliceBytes: 1024, Classes: 2})
	for _, off := range []int64{-1024, 512, 1, 1 << 56, -1 << 63} {
		if _, err := h.Get(0, off); !errors.Is(err, ErrInvalid) {
			t.Errorf("Get(%#x): %v, want ErrInvalid", off, err)
		}
		if _, err := h.Create(0, off); !errors.Is(err, ErrInvalid) {
			t.Errorf("Create(%#x): %v, want ErrInvalid", off, err)
		}
		if _, ok := h.TryGet(0, off); ok {
			t.Errorf("TryGet(%#x) found a table", off)
		}
		h.Drop(off)
	}
	if _, err := h.Get(2, 0); !errors.Is(err, ErrInvalid) {
		t.Errorf("Get of class 2: %v, want ErrInvalid", err)
	}
	get(t, h, 1, 1<<56-1024).Unpin()
}

func TestCreateReplacesWithoutReading(t *testing.T) {
	f := newRecorder(1 << 20)
	h := open(t, newCache(t, 1<<20), f, HandleOptions{Classes: 3})
	store(t, h, 0, 8192, 3, 99)
	tab, err := h.Create(2, 8192)
	if err != nil {
		t.Fatal(err)
	}
	if got := tab.Load(3); got != 0 {
		t.Errorf("created table: word 3 = %d, want 0", got)
	}
	tab.Unpin()
	if f.reads != 1 || h.DirtyTables() != 1 {
		t.Errorf("%d reads, %d dirty; want 1, 1", f.reads, h.DirtyTables())
	}
	writeBack(t, h)
	if got := fmt.Sprint(f.take()); got != "[s w 0x2000+4096 s]" {
		t.Errorf("operations %s: the table must be of class 2 only", got)
	}
}

func TestEvictionKeepsWhatWasStored(t *testing.T) {
	f := newRecorder(0)
	h := open(t, newCache(t, 16*slotBytes), f, HandleOptions{Classes: 3})
	const n = 200
	for i := range n {
		store(t, h, Class(i%3), int64(i)*4096, i, uint64(i)+1)
	}
	for i := range n {
		if got := load(t, h, int64(i)*4096, i); got != uint64(i)+1 {
			t.Fatalf("table %d: %d, want %d", i, got, i+1)
		}
	}
	if s := h.Stats(); s.Tables > 16 || s.Evictions == 0 {
		t.Errorf("stats %+v: more tables than slots, or none evicted", s)
	}
}

func TestCloseWritesBack(t *testing.T) {
	f := newRecorder(0)
	c := newCache(t, 1<<20)
	h, err := c.Open(f, HandleOptions{SliceBytes: 512, Classes: 3})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); !errors.Is(err, ErrInUse) {
		t.Errorf("Close with an open handle: %v, want ErrInUse", err)
	}
	store(t, h, 2, 512, 0, 5)
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if got := f.word(512); got != 5 {
		t.Errorf("file holds %d, want 5", got)
	}
	for name, err := range map[string]error{
		"Get":       second(h.Get(0, 512)),
		"Get other": second(h.Get(0, 1024)),
		"Create":    second(h.Create(0, 1024)),
		"WriteBack": h.WriteBack(),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v, want ErrClosed", name, err)
		}
	}
	if err := errors.Join(h.Close(), h.Discard()); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if n := h.Stats().Tables; n != 0 {
		t.Errorf("%d tables left", n)
	}
}

func second(_ Table, err error) error { return err }

func TestCloseOfCleanHandleDoesNotSync(t *testing.T) {
	f := newRecorder(8192)
	h := open(t, newCache(t, 0), f, HandleOptions{})
	get(t, h, 0, 0).Unpin()
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if got := f.take(); len(got) != 0 {
		t.Errorf("operations %v, want none", got)
	}
}

// TestGetWaitsForDiscard needs a way of a handle that is being discarded and
// is dirty: it waits until the way is free, and not in a loop.
func TestGetWaitsForDiscard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, minBytes)
		h := open(t, c, newRecorder(0), HandleOptions{})
		other := open(t, c, newRecorder(0), HandleOptions{})
		for i := range ways {
			store(t, h, 0, int64(i)*4096, 0, 1)
		}
		g := make(gate)
		f := h.f.(*recorder)
		f.onSync = func() error { g.wait(); return nil }
		var wg sync.WaitGroup
		wg.Go(func() { writeBack(t, h) })
		synctest.Wait()
		wg.Go(func() {
			if err := h.Discard(); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		got := false
		wg.Go(func() { get(t, other, 0, 0).Unpin(); got = true })
		synctest.Wait() // returns only when all wait: nobody spins
		if got {
			t.Error("Get took the way of a table that a pass is writing")
		}
		close(g)
		wg.Wait()
		if s := h.Stats(); s.Tables != 0 || s.DirtyTables != 0 {
			t.Errorf("stats %+v after Discard, want no table", s)
		}
	})
}
