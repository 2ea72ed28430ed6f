package qcow2

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// TestRefcountPlace spells out where refcounts lie in the bytes of a block.
func TestRefcountPlace(t *testing.T) {
	for _, c := range []struct {
		order uint
		index int
		off   int // byte
		shift uint
		bytes int
	}{
		{0, 0, 0, 0, 1}, {0, 1, 0, 1, 1}, {0, 7, 0, 7, 1}, {0, 8, 1, 0, 1}, {0, 70, 8, 6, 1},
		{1, 0, 0, 0, 1}, {1, 3, 0, 6, 1}, {1, 4, 1, 0, 1}, {1, 33, 8, 2, 1},
		{2, 0, 0, 0, 1}, {2, 1, 0, 4, 1}, {2, 2, 1, 0, 1}, {2, 17, 8, 4, 1},
		{3, 0, 0, 0, 1}, {3, 5, 5, 0, 1}, {3, 9, 9, 0, 1},
		{4, 0, 0, 0, 2}, {4, 3, 6, 0, 2}, {4, 5, 10, 0, 2},
		{5, 0, 0, 0, 4}, {5, 1, 4, 0, 4}, {5, 3, 12, 0, 4},
		{6, 0, 0, 0, 8}, {6, 2, 16, 0, 8},
	} {
		g := newGeometry(9, c.order)
		b := make([]byte, 24)
		word, shift := g.refcountWord(c.index)
		w := g.setRefcount(0, shift, g.refcountMax)
		binary.BigEndian.PutUint64(b[word*8:], w)
		var v uint64
		for _, x := range b[c.off : c.off+c.bytes] {
			v = v<<8 | uint64(x)
		}
		if got := v >> c.shift & g.refcountMax; got != g.refcountMax || v&^(g.refcountMax<<c.shift) != 0 {
			t.Errorf("order %d, index %d: block % x, want the refcount at byte %d, bit %d", c.order, c.index, b, c.off, c.shift)
		}
	}
}

func TestRefcountRoundTrip(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for order := uint(0); order <= maxRefcountOrder; order++ {
		g := newGeometry(9, order)
		n := 1 << g.refblockBits
		words, want := make([]uint64, g.clusterSize/8), make([]uint64, n)
		for range 4 * n {
			i, v := rng.IntN(n), rng.Uint64()&g.refcountMax
			word, shift := g.refcountWord(i)
			words[word] = g.setRefcount(words[word], shift, v)
			want[i] = v
		}
		for i, v := range want {
			word, shift := g.refcountWord(i)
			if got := g.getRefcount(words[word], shift); got != v {
				t.Errorf("order %d, index %d: got %d, want %d", order, i, got, v)
			}
		}
	}
}
