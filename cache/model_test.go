package cache

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
)

var seed = flag.Uint64("seed", 0, "seed of the random tests; 0 chooses one")

// random returns a generator, and logs its seed when the test fails.
func random(t *testing.T, stream uint64) *rand.Rand {
	t.Helper()
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("reproduce with -seed=%d (stream %d; the schedule differs)", s, stream)
		}
	})
	return rand.New(rand.NewPCG(s, stream))
}

// A diskFile is a File that knows what is durable, word by word.
type diskFile struct {
	mu      sync.Mutex
	data    []byte // what a reader sees
	durable []byte // what a power loss leaves at least
	// check, if not nil, is called with mu held before data changes.
	check func(p []byte, off int64)
}

func newDiskFile(size int) *diskFile {
	return &diskFile{data: make([]byte, size), durable: make([]byte, size)}
}

func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := copy(p, f.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *diskFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.check != nil {
		f.check(p, off)
	}
	return copy(f.data[off:], p), nil
}

func (f *diskFile) Datasync() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.durable, f.data)
	return nil
}

func (f *diskFile) durableWord(off int64) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return binary.BigEndian.Uint64(f.durable[off:])
}

// TestOrderUnderLoad: many goroutines store a growing number into tables of
// class 0, then 1, then 2, then 3, each its own word, in a cache too small for
// all, with passes, evictions and the background writer running. At every write the
// file checks that no word runs ahead of the durable word of the class below,
// and after a WriteBack that the goroutine's own words are durable.
func TestOrderUnderLoad(t *testing.T) {
	const (
		workers = 8
		tables  = 20 // per class
		rounds  = 300
		class   = tables * slotBytes
	)
	c := newCache(t, 32*slotBytes)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = c.Run(ctx) })
	defer running.Wait()
	defer cancel()

	var images sync.WaitGroup
	for image := range 2 {
		f := newDiskFile(maxClasses * class)
		f.check = func(p []byte, off int64) {
			for i := 0; i < len(p); i += 8 {
				at := off + int64(i)
				if at < class {
					continue
				}
				v, below := binary.BigEndian.Uint64(p[i:]), binary.BigEndian.Uint64(f.durable[at-class:])
				if v > below {
					t.Errorf("image %d: %d is written at %#x while %d is durable in the class below", image, v, at, below)
				}
			}
		}
		h := open(t, c, f, HandleOptions{Classes: maxClasses})
		for w := range workers / 2 {
			rnd := random(t, uint64(image*workers+w))
			images.Go(func() {
				for n := uint64(1); n <= rounds; n++ {
					off := int64(rnd.IntN(tables)) * slotBytes
					for k := range maxClasses {
						store(t, h, Class(k), off+int64(k*class), w, n)
					}
					mark := h.Mark()
					if rnd.IntN(20) == 0 {
						writeBack(t, h)
					}
					if h.Done() < mark {
						continue
					}
					for k := range maxClasses {
						at := off + int64(k*class) + int64(w)*8
						if got := f.durableWord(at); got != n {
							t.Errorf("image %d: %d is durable at %#x after the pass, want %d", image, got, at, n)
						}
					}
				}
			})
		}
	}
	images.Wait()
	cancel()
	running.Wait()
	c.checkInvariants(t)
}

// TestModel runs random operations from many goroutines on several images in
// tiny caches against a model. Each goroutine owns some tables, so that it
// knows what every one of its reads must return; sets, passes, evictions and the
// file are shared by all.
func TestModel(t *testing.T) {
	for _, slots := range []int64{8, 16, 64} {
		for _, slice := range []int{512, 4096} {
			t.Run(fmt.Sprintf("slots=%d/slice=%d", slots, slice), func(t *testing.T) {
				c := newCache(t, slots*slotBytes)
				var all sync.WaitGroup
				var handles []*Handle
				var files []*diskFile
				const images, workers, tables = 3, 4, 16
				for range images {
					f := newDiskFile(workers * tables * slice)
					h, err := c.Open(f, HandleOptions{SliceBytes: slice, Classes: 3})
					if err != nil {
						t.Fatal(err)
					}
					handles, files = append(handles, h), append(files, f)
				}
				models := make([]*model, images*workers)
				for n := range models {
					m := &model{
						h: handles[n/workers], f: files[n/workers],
						rnd:  random(t, uint64(n)),
						want: make([][]uint64, tables), first: n % workers, stride: workers, slice: slice,
					}
					for i := range m.want {
						m.want[i] = make([]uint64, slice/8)
					}
					models[n] = m
					all.Go(func() { m.run(t, 400) })
				}
				all.Wait()
				c.checkInvariants(t)
				for _, h := range handles {
					if err := h.Close(); err != nil {
						t.Error(err)
					}
				}
				for _, m := range models {
					m.checkFile(t)
				}
			})
		}
	}
}

// A model is what one goroutine knows about its tables: every stride-th of the
// file, from first on, so that adjacent tables belong to different goroutines.
type model struct {
	h                    *Handle
	f                    *diskFile
	rnd                  *rand.Rand
	want                 [][]uint64
	first, stride, slice int
}

func (m *model) off(i int) int64 { return int64((i*m.stride + m.first) * m.slice) }

func (m *model) run(t *testing.T, ops int) {
	for n := range ops {
		i := m.rnd.IntN(len(m.want))
		off, class := m.off(i), Class(i%3)
		word, v := m.rnd.IntN(m.slice/8), m.rnd.Uint64()
		switch op := m.rnd.IntN(100); {
		case op < 40:
			tab, err := m.h.Get(class, off)
			if err != nil {
				t.Error(err)
				return
			}
			m.compare(t, tab, i, n)
			tab.Unpin()
		case op < 75:
			tab, err := m.h.Get(class, off)
			if err != nil {
				t.Error(err)
				return
			}
			tab.Store(word, v)
			m.want[i][word] = v
			tab.Unpin()
		case op < 80:
			if tab, ok := m.h.TryGet(class, off); ok {
				m.compare(t, tab, i, n)
				tab.SetWords(word, []uint64{v})
				m.want[i][word] = v
				tab.Unpin()
			}
		case op < 87:
			tab, err := m.h.Create(class, off)
			if err != nil {
				t.Error(err)
				return
			}
			clear(m.want[i])
			m.compare(t, tab, i, n)
			tab.Unpin()
		case op < 94:
			// The cluster is freed and reused: what is written to it now stays.
			m.h.Drop(off)
			p := make([]byte, m.slice)
			for w := range m.want[i] {
				m.want[i][w] = v + uint64(w)
				binary.BigEndian.PutUint64(p[w*8:], v+uint64(w))
			}
			if _, err := m.f.WriteAt(p, off); err != nil {
				t.Error(err)
			}
		case op < 99:
			mark := m.h.Mark()
			if err := m.h.WriteBack(); err != nil {
				t.Error(err)
			}
			if m.h.Done() < mark {
				t.Errorf("done %d after a pass that was to reach %d", m.h.Done(), mark)
			}
			if got := m.f.durableWord(off + int64(word)*8); got != m.want[i][word] {
				t.Errorf("operation %d: table %#x word %d: %#x is durable, want %#x", n, off, word, got, m.want[i][word])
			}
		default:
			_ = m.h.Stats()
		}
	}
}

func (m *model) compare(t *testing.T, tab Table, i, n int) {
	got := make([]uint64, tab.Len())
	tab.Words(got, 0)
	for w := range got {
		if got[w] != m.want[i][w] {
			t.Errorf("operation %d: table %#x word %d: %#x, want %#x", n, m.off(i), w, got[w], m.want[i][w])
			return
		}
	}
}

func (m *model) checkFile(t *testing.T) {
	for i := range m.want {
		for w, want := range m.want[i] {
			if got := binary.BigEndian.Uint64(m.f.data[m.off(i)+int64(w)*8:]); got != want {
				t.Errorf("file at %#x word %d: %#x, want %#x", m.off(i), w, got, want)
				return
			}
		}
	}
}

// TestFailuresUnderLoad fails images at random while others share their sets.
// Nobody hangs, a failed image keeps what was stored, and a healthy one is written.
func TestFailuresUnderLoad(t *testing.T) {
	c := newCache(t, 16*slotBytes)
	broken := errors.New("broken")
	var all sync.WaitGroup
	for n := range 6 {
		rnd := random(t, uint64(n))
		all.Go(func() {
			for round := range 5 {
				f := newRecorder(0)
				fails := n%2 == 0
				if fails {
					left := rnd.IntN(40)
					fail := func() error {
						if left--; left < 0 {
							return broken
						}
						return nil
					}
					if round%2 == 0 {
						f.onSync = fail
					} else {
						f.onWrite = func([]byte, int64) error { return fail() }
					}
				}
				h, err := c.Open(f, HandleOptions{Classes: 3})
				if err != nil {
					t.Error(err)
					return
				}
				want := map[int64]uint64{}
				for range 300 {
					off, v := int64(rnd.IntN(32))*slotBytes, rnd.Uint64()
					tab, err := h.Get(Class(off/slotBytes%3), off)
					if err != nil {
						t.Error(err)
						return
					}
					if got := tab.Load(9); got != want[off] {
						t.Errorf("image %d round %d: %#x at %#x, want %#x", n, round, got, off, want[off])
					}
					tab.Store(9, v)
					tab.Unpin()
					want[off] = v
				}
				err = h.Close()
				if !fails && err != nil {
					t.Errorf("healthy image: %v", err)
				}
				for off, v := range want {
					if err != nil {
						break
					}
					if got := f.word(off + 72); got != v {
						t.Errorf("file at %#x: %#x, want %#x", off, got, v)
					}
				}
				if s := h.Stats(); s.Tables != 0 || s.DirtyTables != 0 {
					t.Errorf("stats %+v after Close, want no table", s)
				}
			}
		})
	}
	all.Wait()
	c.checkInvariants(t)
	if n := c.dirty.Load(); n != 0 {
		t.Errorf("%d dirty tables counted after all are closed", n)
	}
}

// TestEvictionRacesHits hits, stores into and evicts the tables of one set as
// fast as it goes. Each goroutine owns a table: the values it reads there are
// those that it stored, and no other table's.
func TestEvictionRacesHits(t *testing.T) {
	const workers, rounds = 12, 20_000
	f := newDiskFile(workers * 512)
	h := open(t, newCache(t, minBytes), f, HandleOptions{SliceBytes: 512})
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			off := int64(w) * 512
			v := uint64(0)
			for n := range rounds {
				tab, ok := h.TryGet(0, off)
				if !ok {
					var err error
					if tab, err = h.Get(0, off); err != nil {
						t.Error(err)
						return
					}
				}
				if got := tab.Load(3); got != v {
					t.Errorf("table %d: %#x, want %#x", w, got, v)
					tab.Unpin()
					return
				}
				if n%16 == w {
					runtime.Gosched() // let others evict it
				}
				if n%64 == 0 {
					v = uint64(w)<<32 | uint64(n)
					tab.Store(3, v)
				}
				tab.Unpin()
			}
		})
	}
	all.Wait()
}
