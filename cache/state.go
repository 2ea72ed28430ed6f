package cache

import "math/bits"

// A state is the value of a slot's state word, the one word of the arena that
// publishes a slot. It changes by atomic stores and compare-and-swaps only.
//
//	Bits   Meaning
//	 0- 1  kind: 0 free, 1 clean, 2 dirty, 3 held
//	 2- 3  class
//	 4-62  sequence; grows with every store into the table and with every
//	       assignment of the slot, and is never set back, so that a stale
//	       compare-and-swap fails
//	   63  parity: the number of bits set is even
//
// Who moves a slot from one kind to the next, and under which lock:
//
//	free  -> clean   a load, after the content is complete; the way is sealed
//	free  -> dirty   Create, after the content is zeroed; the way is sealed
//	clean -> dirty   the first store; the way is pinned, Handle.mu is held
//	dirty -> clean   a pass, after the Datasync that covers its write, if the
//	                 sequence is that of the copy; Handle.mu is held
//	dirty -> held    the handle has failed and another needs its place (see
//	                 attic); Handle.mu is held
//	any   -> free    eviction (clean only), Drop, Discard, displacement (held
//	                 only); the way is sealed
type state uint64

const (
	kindMask state = 3

	kindFree  state = 0 // belongs to nobody; the other words mean nothing
	kindClean state = 1 // content equals the file
	kindDirty state = 2 // content is newer than the file; a successor adopts it
	kindHeld  state = 3 // as dirty, but of no use to a successor

	dirtyBit state = 2 // set in kindDirty and kindHeld

	classShift = 2
	classMask  = state(maxClasses-1) << classShift
	seqOne     = state(1) << 4
	parityBit  = state(1) << 63
	seqMask    = ^(seqOne - 1) &^ parityBit
)

func (s state) kind() state  { return s & kindMask }
func (s state) dirty() bool  { return s&dirtyBit != 0 }
func (s state) class() Class { return Class(s & classMask >> classShift) }

// valid reports whether no single bit of s was flipped.
func (s state) valid() bool { return bits.OnesCount64(uint64(s))%2 == 0 }

// sealed returns s with the right parity.
func (s state) sealed() state {
	s &^= parityBit
	return s | state(bits.OnesCount64(uint64(s)))<<63
}

// next returns the state of the given kind and class with the sequence after s.
func (s state) next(kind state, class Class) state {
	return (s&seqMask + seqOne | state(class)<<classShift | kind).sealed()
}

// stored returns s after a store: the same with the next sequence.
func (s state) stored() state { return (s + seqOne).sealed() }

// as returns s with another kind and the same class and sequence.
func (s state) as(kind state) state { return (s&^kindMask | kind).sealed() }
