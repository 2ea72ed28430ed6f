package qcow2

// Refcounts lie in refcount blocks, one cluster each. A refcount has 2^order
// bits:
//
//   - 8 bits and more: big endian integers in file order;
//   - 4, 2 and 1 bits: several in a byte, the lower index in the less
//     significant bits.
//
// Blocks are held as 64-bit words, each the big endian value of 8 bytes of the
// file, because that is what the metadata cache gives out atomically.
//
// Spec: qcow2 "Host cluster management", "Refcount block entry".

// refcountWord returns where refcount index of a refcount block lies: the word
// that holds it and its shift inside that word.
func (g *geometry) refcountWord(index int) (word int, shift uint) {
	perWord := 6 - g.refcountOrder // log2
	word = index >> perWord
	bit := uint(index&(1<<perWord-1)) << g.refcountOrder // in file order
	if g.refcountOrder >= 3 {
		return word, 64 - g.refcountBits - bit
	}
	return word, 56 - bit&^7 + bit&7
}

// getRefcount returns the refcount at shift of the word w.
func (g *geometry) getRefcount(w uint64, shift uint) uint64 { return w >> shift & g.refcountMax }

// setRefcount returns w with the refcount at shift set to v, which must not
// exceed refcountMax.
func (g *geometry) setRefcount(w uint64, shift uint, v uint64) uint64 {
	return w&^(g.refcountMax<<shift) | v<<shift
}
