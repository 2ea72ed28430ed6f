package nbdtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"

	"csi-qcow2/nbdexport"
)

// conformanceSize is the least size of a backend for TestBackend.
const conformanceSize = 4 << 20 // bytes

// TestBackend checks that the backends that open returns keep the contract of
// nbdexport.Backend. open returns a new one each time, of at least 4 MiB, that
// reads as zeroes and ends with its test.
func TestBackend(t *testing.T, open func(t *testing.T) nbdexport.Backend) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, b nbdexport.Backend)
	}{
		{"NewReadsAsZeroes", testNewReadsAsZeroes},
		{"RandomOperations", testRandomOperations},
		{"WholeRange", testWholeRange},
		{"OutOfRange", testOutOfRange},
		{"BlockStatusCoversAll", testBlockStatusCoversAll},
		{"ConcurrentDisjointWrites", testConcurrentDisjointWrites},
		{"FastZero", testFastZero},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := open(t)
			if b.Size() < conformanceSize {
				t.Fatalf("backend of %d bytes: want at least %d", b.Size(), conformanceSize)
			}
			tt.test(t, b)
		})
	}
}

// checkRange compares [off, off+len(want)) with want.
func checkRange(t *testing.T, b nbdexport.Backend, off int64, want []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xee}, len(want))
	n, err := b.ReadAt(got, off)
	if err != nil || n != len(want) {
		t.Fatalf("read of %d at %#x: %d, %v", len(want), off, n, err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %#x is %#x: want %#x", off+int64(i), got[i], want[i])
		}
	}
}

func testNewReadsAsZeroes(t *testing.T, b nbdexport.Backend) {
	checkRange(t, b, 0, make([]byte, conformanceSize))
	checkRange(t, b, b.Size()-1, []byte{0})
}

// testRandomOperations compares with a slice after each operation.
func testRandomOperations(t *testing.T, b nbdexport.Backend) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	model := make([]byte, conformanceSize)
	for i := range 400 {
		n := 1 + rng.Int64N([]int64{700, 70 << 10, 600 << 10}[i%3])
		off := rng.Int64N(conformanceSize - n + 1)
		if rng.IntN(2) == 0 {
			off, n = off&^4095, (n+4095)&^4095
		}
		p := model[off : off+n]
		var what string
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			what = "write"
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			var written int
			written, err = b.WriteAt(p, off)
			if err == nil && written != len(p) {
				err = fmt.Errorf("%d bytes written", written)
			}
		case 2:
			what = "zeroes"
			clear(p)
			err = b.WriteZeroes(off, n, false)
		case 3:
			what = "zeroes with unmap"
			clear(p)
			err = b.WriteZeroes(off, n, true)
		case 4:
			what = "discard"
			before := bytes.Clone(p)
			if err = b.Discard(off, n); err == nil {
				adoptDiscard(t, b, off, p, before)
			}
		case 5:
			what = "flush"
			err = b.Flush()
		}
		if err != nil {
			t.Fatalf("operation %d: %s of %d at %#x: %v", i, what, n, off, err)
		}
		around := max(0, off-5000)
		checkRange(t, b, around, model[around:min(conformanceSize, off+n+5000)])
	}
	checkRange(t, b, 0, model)
}

// adoptDiscard reads what a discard has left in p, which must be what was there
// or zeroes.
func adoptDiscard(t *testing.T, b nbdexport.Backend, off int64, p, before []byte) {
	t.Helper()
	if _, err := b.ReadAt(p, off); err != nil {
		t.Fatalf("read after discard: %v", err)
	}
	for i := range p {
		if p[i] != 0 && p[i] != before[i] {
			t.Fatalf("byte %#x after discard is %#x: want %#x or 0", off+int64(i), p[i], before[i])
		}
	}
}

// testWholeRange writes the last byte and operates on everything at once.
func testWholeRange(t *testing.T, b nbdexport.Backend) {
	if _, err := b.WriteAt([]byte{7}, b.Size()-1); err != nil {
		t.Fatal(err)
	}
	checkRange(t, b, b.Size()-1, []byte{7})
	if err := b.WriteZeroes(0, b.Size(), true); err != nil {
		t.Fatal(err)
	}
	checkRange(t, b, b.Size()-2, []byte{0, 0})
	if err := b.Discard(0, b.Size()); err != nil {
		t.Fatal(err)
	}
	checkRange(t, b, 0, make([]byte, 4096))
}

// testOutOfRange checks that ranges that the server never sends do no harm.
func testOutOfRange(t *testing.T, b nbdexport.Backend) {
	if n, err := b.ReadAt(make([]byte, 2), b.Size()-1); err == nil {
		t.Errorf("read beyond the end: %d bytes and no error", n)
	}
}

// testBlockStatusCoversAll walks the whole backend.
func testBlockStatusCoversAll(t *testing.T, b nbdexport.Backend) {
	data := bytes.Repeat([]byte{0x5a}, 100<<10)
	for _, off := range []int64{0, 1<<20 + 12345, 3 << 20} {
		if _, err := b.WriteAt(data, off); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []int64{b.Size(), 1 << 20, 10007} {
		for off := int64(0); off < conformanceSize; {
			ask := min(step, b.Size()-off)
			e, err := b.BlockStatus(t.Context(), off, ask)
			if err != nil {
				t.Fatal(err)
			}
			if e.Len < 1 || e.Len > ask {
				t.Fatalf("extent of %d bytes at %#x: want 1 to %d", e.Len, off, ask)
			}
			if e.Zero {
				n := min(e.Len, conformanceSize-off)
				checkRange(t, b, off, make([]byte, max(0, n)))
			}
			off += e.Len
		}
	}
}

// testConcurrentDisjointWrites has many writers, each with a range of its own,
// that share blocks at their borders.
func testConcurrentDisjointWrites(t *testing.T, b nbdexport.Backend) {
	const writers, each = 8, 100_001 // bytes; no multiple of any block
	model := make([]byte, writers*each)
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(w), 1))
			mine := model[w*each : (w+1)*each]
			for range 60 {
				n := 1 + rng.IntN(9000)
				off := rng.IntN(each - n)
				for i := off; i < off+n; i++ {
					mine[i] = byte(rng.Uint32())
				}
				if _, err := b.WriteAt(mine[off:off+n], int64(w*each+off)); err != nil {
					t.Error(err)
					return
				}
				if rng.IntN(10) == 0 {
					if err := b.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	checkRange(t, b, 0, model)
}

// testFastZero checks that a fast zero does all or nothing.
func testFastZero(t *testing.T, b nbdexport.Backend) {
	fast, ok := b.(nbdexport.FastZeroer)
	if !ok {
		return // the server refuses FAST_ZERO for it
	}
	model := bytes.Repeat([]byte{9}, 256<<10)
	if _, err := b.WriteAt(model, 0); err != nil {
		t.Fatal(err)
	}
	err := fast.WriteZeroesFast(4096, 100<<10, true)
	switch {
	case err == nil:
		clear(model[4096 : 4096+100<<10])
	case !errors.Is(err, syscall.EOPNOTSUPP):
		t.Fatalf("fast zero: %v: want nil or EOPNOTSUPP", err)
	}
	checkRange(t, b, 0, model)
}
