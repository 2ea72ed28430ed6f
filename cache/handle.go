package cache

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// A Handle is the view that one image has of the Cache: its tables, their
// dirty lists and its passes. All methods may be called from many goroutines at
// once, with the exceptions that they name.
type Handle struct {
	c      *Cache
	f      File
	o      HandleOptions
	number int
	seed   uint64 // of the hash; see Cache.set
	misfit uint64 // bits that are 0 in a valid offset

	counters  counters
	adopted   int         // dirty tables that a predecessor left
	mark      markKind    // what else it left; constant
	unclaimed atomic.Bool // the tables of a predecessor; the image is not open yet

	started atomic.Uint64         // passes started; changed under mu
	done    atomic.Uint64         // number of the last pass that succeeded; changed under mu
	failure atomic.Pointer[error] // first failed write or sync, nil if none; changed under mu
	ndirty  atomic.Int64          // dirty tables: listed, in a pass or in the attic; changed under mu

	ordered  atomic.Bool    // see Order; a pass takes it back
	written  bool           // the running pass has written tables since its last sync
	wg       sync.WaitGroup // the goroutines of passes
	cond     *sync.Cond     // on mu: a pass has ended, or has made tables clean
	quiet    *sync.Cond     // on mu: a write of a pass has ended, or all loads have
	released chan struct{}  // closed at the end of Discard

	mu       sync.Mutex
	clean    list             // guarded by mu
	dirty    [maxClasses]list // guarded by mu
	items    []item           // of the running pass; guarded by mu
	running  bool             // a pass is running; guarded by mu
	cleaned  uint64           // how often a pass has made tables clean; guarded by mu
	notified uint64           // last value given to OnWriteBack; guarded by mu
	calling  bool             // OnWriteBack is running; guarded by mu
	loads    int              // under way; guarded by mu
	closed   bool             // guarded by mu
	attic    attic            // guarded by mu

	bufs [maxClasses][]byte // copies of the running pass, per class
}

func (h *Handle) key(off int64) key {
	return key(h.number)<<keyOffsetBits | key(off>>9)
}

// check returns an error if there can be no table of the class at off.
func (h *Handle) check(class Class, off int64) error {
	if uint64(off)&h.misfit != 0 {
		return fmt.Errorf("%w: table offset %#x: it must be a multiple of %d below %#x", ErrInvalid, off, h.o.SliceBytes, uint64(1)<<offsetBits)
	}
	if int(class) >= h.o.Classes {
		return fmt.Errorf("%w: class %d of %d", ErrInvalid, class, h.o.Classes)
	}
	return nil
}

func (h *Handle) table(i slotIndex) Table {
	return Table{h: h, base: h.c.arena.slot(i), slot: i, n: uint32(h.o.SliceBytes / 8)}
}

// Get returns the table slice at host offset off, pinned. If it is not cached,
// it is read from the file; all who want it meanwhile wait for that one read. A
// class other than that of the first Get of a cached slice is ignored.
//
// Get returns the error of a failed read to all who waited for it, and caches
// nothing then; ErrInvalid for an offset that is not a multiple of the slice;
// ErrClosed after Close.
//
// Preconditions: the caller has no table pinned. Get may wait for a pass, of
// any image, when all ways of a set are dirty.
func (h *Handle) Get(class Class, off int64) (Table, error) {
	if err := h.check(class, off); err != nil {
		return Table{}, err
	}
	k := h.key(off)
	s, n := h.c.set(h.seed, off)
	if w, ok := s.lookup(k); ok {
		h.counters.hit(n)
		return h.table(slotIndex(n*ways + w)), nil
	}
	return h.get(class, off, k, s, n)
}

// TryGet returns the table slice at off, pinned, if it is cached. It does no
// I/O and does not wait. The caller may have other tables pinned.
func (h *Handle) TryGet(class Class, off int64) (Table, bool) {
	if h.check(class, off) != nil {
		return Table{}, false
	}
	s, n := h.c.set(h.seed, off)
	w, ok := s.lookup(h.key(off))
	if !ok {
		return Table{}, false
	}
	h.counters.hit(n)
	return h.table(slotIndex(n*ways + w)), true
}

// get is Get after a miss.
func (h *Handle) get(class Class, off int64, k key, s *set, n int) (Table, error) {
	for {
		s.mu.Lock()
		if w, ok := s.findLocked(k); ok {
			if f := s.fillLocked(w); f != nil {
				s.mu.Unlock()
				<-f.done
				if f.err != nil {
					return Table{}, f.err
				}
				continue // it may have been evicted again
			}
			s.pin(w) // succeeds: no way is sealed but by a fill when mu is free
			s.mu.Unlock()
			h.counters.hit(n)
			return h.table(slotIndex(n*ways + w)), nil
		}
		w, retry := h.c.vacateLocked(s, n)
		if retry != nil {
			s.mu.Unlock()
			if err := retry(); err != nil {
				return Table{}, err
			}
			continue
		}
		if !h.beginLoad() {
			s.unsealLocked(w, 0)
			s.mu.Unlock()
			return Table{}, ErrClosed
		}
		s.keys[w].Store(uint64(k))
		f := s.addFillLocked(w)
		s.mu.Unlock()
		h.counters.misses.Add(1)
		return h.load(class, off, s, n, f)
	}
}

// Create returns the table slice at off, pinned, zeroed and dirty, without
// reading it. A cached slice at off, dirty or not, is forgotten as by Drop.
//
// Preconditions: as for Get.
func (h *Handle) Create(class Class, off int64) (Table, error) {
	if err := h.check(class, off); err != nil {
		return Table{}, err
	}
	k := h.key(off)
	s, n := h.c.set(h.seed, off)
	for {
		s.mu.Lock()
		w, retry := h.takeLocked(s, n, k)
		if retry == nil && w < 0 {
			w, retry = h.c.vacateLocked(s, n)
		}
		if retry != nil {
			s.mu.Unlock()
			if err := retry(); err != nil {
				return Table{}, err
			}
			continue
		}
		i := slotIndex(n*ways + w)
		clear(h.c.arena.bytes(i, h.o.SliceBytes))
		if !h.publish(i, class, off, true) {
			s.unsealLocked(w, 0)
			s.mu.Unlock()
			return Table{}, ErrClosed
		}
		s.keys[w].Store(uint64(k))
		s.unsealLocked(w, 1)
		s.mu.Unlock()
		return h.table(i), nil
	}
}

// Drop forgets the table slice at off, dirty or not: its cluster was freed.
// When Drop returns, no copy of the slice will be written to the file any more:
// a running pass leaves out what it has copied and not yet begun to write, and
// for a write that has begun Drop waits (for that write, not for the pass). So
// whatever is written to the cluster afterwards stays.
//
// Preconditions: the caller has no table pinned. Drop waits until others have
// unpinned this one.
func (h *Handle) Drop(off int64) {
	if uint64(off)&h.misfit != 0 {
		return // no table can be there
	}
	k := h.key(off)
	s, n := h.c.set(h.seed, off)
	for {
		s.mu.Lock()
		w, retry := h.takeLocked(s, n, k)
		if retry == nil {
			if w >= 0 {
				s.unsealLocked(w, 0)
			}
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		_ = retry() // only waits
	}
}

// takeLocked removes the table k of h from set s, number n, and from the
// attic, whatever its state. It returns its way, free and sealed, or -1 if it
// was in no way. If it must wait first, it returns what to call after
// unlocking s.mu, before the next try.
func (h *Handle) takeLocked(s *set, n int, k key) (way int, retry func() error) {
	w, ok := s.findLocked(k)
	if !ok {
		if h.failure.Load() != nil { // else the attic is empty
			h.mu.Lock()
			h.dropFromAtticLocked(k.offset())
			h.mu.Unlock()
		}
		return -1, nil
	}
	if f := s.fillLocked(w); f != nil {
		return -1, wait(f.done)
	}
	if !s.sealLocked(w) {
		return -1, wait(s.awaitLocked(1 << w))
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slotIndex(n*ways + w)
	if it := h.slotItemLocked(i); it != nil && it.writing {
		s.unsealLocked(w, 0)
		return -1, func() error {
			h.mu.Lock()
			for it := h.slotItemLocked(i); it != nil && it.writing; it = h.slotItemLocked(i) {
				h.quiet.Wait()
			}
			h.mu.Unlock()
			return nil
		}
	}
	h.forgetLocked(i)
	s.keys[w].Store(0)
	return w, nil
}

// wait returns a function that waits for ch; a nil channel is ready.
func wait(ch <-chan struct{}) func() error {
	return func() error {
		if ch != nil {
			<-ch
		}
		return nil
	}
}
