package cache

import (
	"math/bits"
	"sync"
	"sync/atomic"
)

// ways is the number of slots of a set.
const ways = 8

// A slotIndex is the number of a slot: set*ways + way.
type slotIndex uint32

// A key names a table slice of the process.
//
//	Bits   Meaning
//	 0-46  host offset / 512
//	47-63  number of the handle; 0 is no handle, so that key 0 is no table
type key uint64

const (
	keyOffsetBits = 47
	offsetBits    = keyOffsetBits + 9 // host offsets are below 1<<56
	maxHandles    = 1<<17 - 1
)

func (k key) handle() int   { return int(k >> keyOffsetBits) }
func (k key) offset() int64 { return int64(k&(1<<keyOffsetBits-1)) << 9 }

// A set holds the ways among which a table can be: found by hash, searched by
// comparing eight words of one cache line.
//
// A hit takes no lock: it finds the key, raises the way's pin count unless the
// way is sealed, and looks at the key again. Everything else about a set happens
// under mu, which is never held over I/O.
//
// Rejected: a linear scan over all slots (QEMU's qcow2_cache_do_get: cost grows
// with the cache); one map and one LRU list (a lock shared by every hit, and
// pointers for the garbage collector to follow); a mutex around each hit (two
// more atomics, and with few sets a queue on a hot one). Eight ways and second
// chance lose little against LRU over everything: conflicts in a set matter only
// when nearly all of the budget is in use. BenchmarkGetHit: 30 ns of processor time and
// no allocation from 16 to 1,000,000 slots.
type set struct {
	keys [ways]atomic.Uint64 // key of each way, 0 if none; changed under mu while the way is sealed
	pins [ways]atomic.Uint32 // see pinSealed and so on

	mu    sync.Mutex
	fills *fill         // loads under way; guarded by mu
	wait  chan struct{} // closed when a way that someone waits for is unpinned; guarded by mu
	hand  uint8         // way the clock looks at next; guarded by mu
	_     [7]byte
}

// Bits of a pin word.
const (
	pinSealed  = 1 << 31 // one owner (under set.mu, or a fill) changes what the way holds; no hit pins it
	pinAwaited = 1 << 30 // someone waits until the count is 0
	pinUsed    = 1 << 29 // pinned since the clock last passed: second chance
	pinCount   = 1<<24 - 1
)

// lookup returns the way that holds k, pinned. It takes no lock, and misses
// when k is being loaded or replaced.
func (s *set) lookup(k key) (way int, ok bool) {
	for w := range s.keys {
		if s.keys[w].Load() != uint64(k) {
			continue
		}
		if !s.pin(w) {
			return 0, false
		}
		if s.keys[w].Load() == uint64(k) {
			return w, true
		}
		s.unpin(w) // replaced between the two looks
		return 0, false
	}
	return 0, false
}

// pin raises the pin count of a way, unless it is sealed.
func (s *set) pin(w int) bool {
	for {
		p := s.pins[w].Load()
		if p&pinSealed != 0 {
			return false
		}
		if s.pins[w].CompareAndSwap(p, (p+1)|pinUsed) {
			return true
		}
	}
}

func (s *set) unpin(w int) {
	p := s.pins[w].Add(^uint32(0))
	if p&pinCount == 0 && p&pinAwaited != 0 {
		s.mu.Lock()
		s.pins[w].And(^uint32(pinAwaited))
		s.wakeLocked()
		s.mu.Unlock()
	}
}

// sealLocked takes a way for the holder of mu; false if it is pinned.
func (s *set) sealLocked(w int) bool {
	for {
		p := s.pins[w].Load()
		if p&pinCount != 0 || p&pinSealed != 0 {
			return false
		}
		if s.pins[w].CompareAndSwap(p, p|pinSealed) {
			return true
		}
	}
}

// unsealLocked opens a sealed way with the given pin count, 0 or 1, and wakes
// who waits for any way of the set. A table that was just loaded does not count as
// used: one that is read once must not push out those in use.
func (s *set) unsealLocked(w int, pins uint32) {
	s.pins[w].Store(pins)
	s.wakeLocked()
}

// wakeLocked wakes all who wait for a way; they look again.
func (s *set) wakeLocked() {
	if s.wait != nil {
		close(s.wait)
		s.wait = nil
	}
}

// awaitLocked returns a channel that is closed when one of the given ways may
// have been unpinned or unsealed. If one has been already, it returns nil: look again.
func (s *set) awaitLocked(wanted uint8) <-chan struct{} {
	if wanted == 0 {
		return nil
	}
	if s.wait == nil {
		s.wait = make(chan struct{})
	}
	for m := wanted; m != 0; m &= m - 1 {
		w := bits.TrailingZeros8(m)
		if p := s.pins[w].Or(pinAwaited); p&(pinCount|pinSealed) == 0 {
			return nil
		}
	}
	return s.wait
}

// findLocked returns the way of k, which may be loading.
func (s *set) findLocked(k key) (way int, ok bool) {
	for w := range s.keys {
		if s.keys[w].Load() == uint64(k) {
			return w, true
		}
	}
	return 0, false
}

// A fill is a load under way. Its way is sealed and already has the key, so
// that all who want the same table find it.
type fill struct {
	way  int
	next *fill
	done chan struct{} // closed at the end
	err  error         // written before done is closed
}

func (s *set) fillLocked(w int) *fill {
	for f := s.fills; f != nil; f = f.next {
		if f.way == w {
			return f
		}
	}
	return nil
}

func (s *set) addFillLocked(w int) *fill {
	s.fills = &fill{way: w, next: s.fills, done: make(chan struct{})}
	return s.fills
}

func (s *set) removeFillLocked(f *fill) {
	for p := &s.fills; *p != nil; p = &(*p).next {
		if *p == f {
			*p = f.next
			return
		}
	}
}
