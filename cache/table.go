package cache

import (
	"math/bits"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/cpu"
)

// A Table is a pinned table slice: an array of big-endian 64-bit words. Its
// place does not move and is not evicted until Unpin. The zero Table is not valid.
//
// Words are read and written atomically, one by one; which goroutine may change
// which word is for the caller to arrange. Between Get and Unpin a caller must
// not call Get, Create, Drop, Close or Discard, of any handle: it could wait
// for the very way it has pinned.
type Table struct {
	h    *Handle
	base unsafe.Pointer // first byte of the slot
	slot slotIndex
	n    uint32 // words
}

// Len returns the number of 64-bit words.
func (t Table) Len() int { return int(t.n) }

// check panics unless the n words from word i on are in the table.
func (t Table) check(i, n int) {
	if i < 0 || n > t.Len() || i > t.Len()-n {
		panic("cache: table index out of range")
	}
}

func (t Table) word(i int) *uint64 {
	if uint(i) >= uint(t.n) {
		panic("cache: table index out of range")
	}
	return (*uint64)(unsafe.Add(t.base, uintptr(i)*8))
}

// words returns the n words from word i on, which check has admitted.
func (t Table) words(i, n int) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Add(t.base, uintptr(i)*8)), n)
}

// Load returns word i.
func (t Table) Load(i int) uint64 { return bigEndian(atomic.LoadUint64(t.word(i))) }

// Store sets word i and makes the table dirty. When Store returns, the change
// survives the death of the process if the arena does, and it is durable when
// a pass that starts later is done (see Handle.Mark).
func (t Table) Store(i int, v uint64) {
	t.h.c.arena.store(t.word(i), bigEndian(v))
	t.touch()
}

// Words copies len(dst) words from word i on to dst.
func (t Table) Words(dst []uint64, i int) {
	t.check(i, len(dst))
	for n, w := 0, t.words(i, len(dst)); n < len(dst) && n < len(w); n++ {
		dst[n] = bigEndian(atomic.LoadUint64(&w[n]))
	}
}

// SetWords stores the words src from word i on, in ascending order, and makes
// the table dirty once. Each word changes atomically, all together do not: a
// reader, a pass and a successor may see some of them.
func (t Table) SetWords(i int, src []uint64) {
	t.check(i, len(src))
	if len(src) == 0 {
		return
	}
	a := t.h.c.arena
	w := t.words(i, len(src))
	if a.onStore != nil {
		for n, v := range src {
			a.store(&w[n], bigEndian(v))
		}
	} else {
		// Plain stores: each of an aligned word is one store all the same, as Go
		// promises too, and the exchange of the state word in touch orders them. Atomic
		// ones would wait for each other.
		for n := 0; n < len(src) && n < len(w); n++ {
			w[n] = bigEndian(src[n])
		}
	}
	t.touch()
}

// Fill stores v into all words; as SetWords.
func (t Table) Fill(v uint64) {
	v = bigEndian(v)
	for i := range t.Len() {
		t.h.c.arena.store(t.word(i), v)
	}
	t.touch()
}

// Unpin gives the table back. t must not be used after it.
func (t Table) Unpin() {
	t.h.c.sets[t.slot/ways].unpin(int(t.slot % ways))
}

// Touch makes the table dirty without a change: a store that follows soon does
// not take a lock for it then.
func (t Table) Touch() { t.touch() }

// touch publishes a change of the content: after the content, the sequence
// grows, and a clean slot becomes dirty.
func (t Table) touch() {
	a := t.h.c.arena
	for {
		s := a.state(t.slot)
		if !s.dirty() {
			t.h.makeDirty(t.slot)
			return
		}
		if a.swapState(t.slot, s, s.stored()) {
			return
		}
	}
}

// bigEndian converts between host order and big endian, both ways.
func bigEndian(v uint64) uint64 {
	if cpu.IsBigEndian {
		return v
	}
	return bits.ReverseBytes64(v) // one instruction; the compiler makes eight of encoding/binary's way
}
