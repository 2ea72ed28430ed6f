package cache

import (
	"encoding/binary"
	"sync/atomic"
)

// Words of a directory entry. An entry says whose table a slot holds, so that
// a successor can find the dirty tables of an image.
//
//	Word  Field   Meaning
//	   0  state   kind, class and sequence; the publish word (see state)
//	   1  offset  host offset of the table slice, bytes
//	   2  id      bytes 0-7 of the image's identity, little endian
//	   3  id      bytes 8-15
//	   4  length  bytes of the slice: 512, 1024, 2048 or 4096
//	   5  check   entryCheck of words 1-4 and the slot's number
//	   6  -       0
//	   7  -       0
//
// Words 1-5 are valid while the state word is not free. The words are in host
// byte order: an arena never leaves its machine.
const (
	wordState    = 0
	wordOffset   = 1
	wordID       = 2
	wordLength   = 4
	wordCheck    = 5
	wordReserved = 6
)

// describe stores whose table the slot is about to hold. The slot is not published.
func (a *arena) describe(i slotIndex, id [16]byte, off int64, length int) {
	lo, hi := idWords(id)
	a.store(a.word(i, wordOffset), uint64(off))
	a.store(a.word(i, wordID), lo)
	a.store(a.word(i, wordID+1), hi)
	a.store(a.word(i, wordLength), uint64(length))
	a.store(a.word(i, wordCheck), a.checkOf(i))
}

// checkOf returns the check that the entry of slot i ought to have.
func (a *arena) checkOf(i slotIndex) uint64 {
	return entryCheck(i, a.load(i, wordOffset), a.load(i, wordID), a.load(i, wordID+1), a.load(i, wordLength))
}

func (a *arena) load(i slotIndex, n uintptr) uint64 { return atomic.LoadUint64(a.word(i, n)) }

// unpublish makes the slot free: from here on it means nothing to a successor.
func (a *arena) unpublish(i slotIndex) {
	a.setState(i, a.state(i).next(kindFree, 0))
}

func idWords(id [16]byte) (lo, hi uint64) {
	return binary.LittleEndian.Uint64(id[:8]), binary.LittleEndian.Uint64(id[8:])
}

func wordsID(lo, hi uint64) (id [16]byte) {
	binary.LittleEndian.PutUint64(id[:8], lo)
	binary.LittleEndian.PutUint64(id[8:], hi)
	return id
}

// entryCheck is a checksum over an entry: a flipped bit in it must not put a
// table at another offset or into another image.
func entryCheck(i slotIndex, words ...uint64) uint64 {
	h := mix(uint64(i) + 1)
	for _, w := range words {
		h = mix(h ^ w)
	}
	return h
}

// mix spreads the bits of x; the high bits are the best ones.
func mix(x uint64) uint64 {
	x ^= x >> 32
	x *= 0x9e3779b97f4a7c15
	x ^= x >> 29
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 32
	return x
}
