package storagetest

import (
	"bytes"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
)

// A File is what qcow2.File is.
type File interface {
	io.ReaderAt
	io.WriterAt
	WritevAt(bufs [][]byte, off int64) (int, error)
	Datasync() error
	Truncate(size int64) error
	Size() (int64, error)
	Punch(off, n int64) error
	Allocate(off, n int64) error
	io.Closer
}

// TestFile verifies the contract of File against files that open returns,
// which are empty and on a host that can punch holes.
func TestFile(t *testing.T, open func(t *testing.T) File) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, File)
	}{
		{"ReadAtBeyondEnd", testReadBeyondEnd},
		{"WriteAtExtends", testWriteExtends},
		{"WritevAtJoins", testWritev},
		{"TruncateZeroes", testTruncate},
		{"PunchZeroes", testPunch},
		{"AllocateKeepsContent", testAllocate},
		{"NegativeOffsets", testNegative},
		{"EmptyRequests", testEmpty},
		{"Sparse", testSparse},
		{"RandomAgainstBytes", testRandom},
		{"Concurrent", testConcurrent},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := open(t)
			test.run(t, f)
			if err := f.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
			if _, err := f.ReadAt(make([]byte, 1), 0); err == nil || err == io.EOF {
				t.Errorf("ReadAt after Close: got %v, want an error", err)
			}
			if _, err := f.WriteAt(make([]byte, 1), 0); err == nil {
				t.Error("WriteAt after Close: no error")
			}
			if err := f.Datasync(); err == nil {
				t.Error("Datasync after Close: no error")
			}
		})
	}
}

// mustWrite writes p and fails the test on an error.
func mustWrite(t *testing.T, f File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt(%d bytes, %#x) = %d, %v", len(p), off, n, err)
	}
}

// wantContent compares the whole file with want.
func wantContent(t *testing.T, f File, want []byte) {
	t.Helper()
	if size, err := f.Size(); size != int64(len(want)) || err != nil {
		t.Fatalf("Size() = %d, %v, want %d", size, err, len(want))
	}
	got := make([]byte, len(want))
	if n, err := f.ReadAt(got, 0); n != len(got) || err != nil && err != io.EOF {
		t.Fatalf("ReadAt(%d bytes, 0) = %d, %v", len(got), n, err)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("byte %#x is %#x, want %#x", i, got[i], want[i])
		}
	}
}

func pattern(n int, seed byte) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i*7+i>>8) ^ seed | 1
	}
	return p
}

func testReadBeyondEnd(t *testing.T, f File) {
	mustWrite(t, f, pattern(1000, 1), 0)
	p := make([]byte, 100)
	if n, err := f.ReadAt(p, 950); n != 50 || err != io.EOF {
		t.Errorf("read across the end: got %d, %v, want 50, EOF", n, err)
	}
	if !bytes.Equal(p[:50], pattern(1000, 1)[950:]) {
		t.Error("read across the end: wrong bytes")
	}
	for _, off := range []int64{1000, 1001, 1 << 40} {
		if n, err := f.ReadAt(p, off); n != 0 || err != io.EOF {
			t.Errorf("read at %d: got %d, %v, want 0, EOF", off, n, err)
		}
	}
}

func testWriteExtends(t *testing.T, f File) {
	mustWrite(t, f, pattern(100, 1), 10000)
	want := make([]byte, 10100)
	copy(want[10000:], pattern(100, 1))
	wantContent(t, f, want)
	mustWrite(t, f, pattern(300, 2), 9900)
	want = append(want, make([]byte, 100)...)
	copy(want[9900:], pattern(300, 2))
	wantContent(t, f, want)
}

func testWritev(t *testing.T, f File) {
	var bufs [][]byte
	var want []byte
	for i := range 3000 { // more than the 1024 buffers that one system call takes
		b := pattern(i%7*100, byte(i))
		bufs = append(bufs, b)
		want = append(want, b...)
	}
	if n, err := f.WritevAt(bufs, 0); n != len(want) || err != nil {
		t.Fatalf("WritevAt = %d, %v, want %d, nil", n, err, len(want))
	}
	wantContent(t, f, want)
	for i, b := range bufs {
		if !bytes.Equal(b, pattern(i%7*100, byte(i))) {
			t.Fatalf("WritevAt changed buffer %d", i)
		}
	}
}

func testTruncate(t *testing.T, f File) {
	mustWrite(t, f, pattern(10000, 1), 0)
	for _, size := range []int64{5001, 9000, 0, 100} {
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		if size != 0 && size != 100 {
			copy(want, pattern(10000, 1)[:5001])
		}
		wantContent(t, f, want)
	}
}

func testPunch(t *testing.T, f File) {
	want := pattern(40000, 1)
	mustWrite(t, f, want, 0)
	for _, r := range [][2]int64{{4096, 8192}, {100, 200}, {20000, 9000}, {39000, 100000}} {
		if err := f.Punch(r[0], r[1]); err != nil {
			t.Fatalf("Punch(%d, %d): %v", r[0], r[1], err)
		}
		clear(want[r[0]:min(r[0]+r[1], 40000)])
		wantContent(t, f, want)
	}
}

func testAllocate(t *testing.T, f File) {
	want := pattern(10000, 1)
	mustWrite(t, f, want, 0)
	if err := f.Allocate(0, 8192); err != nil {
		t.Fatal(err)
	}
	wantContent(t, f, want)
	if err := f.Allocate(8192, 8192); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 6384)
	if _, err := f.ReadAt(p, 10000); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if !bytes.Equal(p, make([]byte, 6384)) {
		t.Error("allocated bytes do not read as zeroes")
	}
	if err := f.Truncate(10000); err != nil {
		t.Fatal(err)
	}
	wantContent(t, f, want)
}

func testNegative(t *testing.T, f File) {
	p := make([]byte, 10)
	if _, err := f.ReadAt(p, -1); err == nil || err == io.EOF {
		t.Errorf("ReadAt(-1): got %v, want an error", err)
	}
	if _, err := f.WriteAt(p, -1); err == nil {
		t.Error("WriteAt(-1): no error")
	}
	if _, err := f.WritevAt([][]byte{p}, -1); err == nil {
		t.Error("WritevAt(-1): no error")
	}
	if err := f.Truncate(-1); err == nil {
		t.Error("Truncate(-1): no error")
	}
	wantContent(t, f, nil)
}

func testEmpty(t *testing.T, f File) {
	if n, err := f.WriteAt(nil, 100); n != 0 || err != nil {
		t.Errorf("WriteAt(nil) = %d, %v", n, err)
	}
	if n, err := f.WritevAt(nil, 100); n != 0 || err != nil {
		t.Errorf("WritevAt(nil) = %d, %v", n, err)
	}
	if n, err := f.WritevAt([][]byte{nil, {}}, 100); n != 0 || err != nil {
		t.Errorf("WritevAt(empty buffers) = %d, %v", n, err)
	}
	wantContent(t, f, nil)
	if err := f.Datasync(); err != nil {
		t.Errorf("Datasync of an empty file: %v", err)
	}
}

func testSparse(t *testing.T, f File) {
	const far = 1 << 40
	mustWrite(t, f, pattern(5000, 1), far-1000)
	p := make([]byte, 7000)
	if n, err := f.ReadAt(p, far-3000); n != 7000 || err != nil && err != io.EOF {
		t.Fatalf("ReadAt = %d, %v", n, err)
	}
	if want := append(make([]byte, 2000), pattern(5000, 1)...); !bytes.Equal(p, want) {
		t.Error("wrong bytes around a far write")
	}
	if err := f.Punch(0, far+4000); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(p[:1000], far); n != 1000 || err != nil || !bytes.Equal(p[:1000], make([]byte, 1000)) {
		t.Errorf("ReadAt after a large Punch = %d, %v, or not zeroes", n, err)
	}
}

func testRandom(t *testing.T, f File) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	var want []byte
	grow := func(n int) {
		if n > len(want) {
			want = append(want, make([]byte, n-len(want))...)
		}
	}
	for i := range 500 {
		off, n := rng.IntN(60000), rng.IntN(9000)
		if rng.IntN(2) == 0 {
			off, n = off&^511, n&^511+512
		}
		data := pattern(n, byte(i))
		switch rng.IntN(6) {
		case 0, 1:
			mustWrite(t, f, data, int64(off))
			if n > 0 {
				grow(off + n)
				copy(want[off:], data)
			}
		case 2:
			cut := rng.IntN(n + 1)
			if _, err := f.WritevAt([][]byte{data[:cut], data[cut:]}, int64(off)); err != nil {
				t.Fatal(err)
			}
			if n > 0 {
				grow(off + n)
				copy(want[off:], data)
			}
		case 3:
			if n == 0 {
				continue
			}
			if err := f.Punch(int64(off), int64(n)); err != nil {
				t.Fatal(err)
			}
			if off < len(want) {
				clear(want[off:min(off+n, len(want))])
			}
		case 4:
			if err := f.Truncate(int64(off)); err != nil {
				t.Fatal(err)
			}
			grow(off)
			want = append([]byte(nil), want[:off]...)
		case 5:
			if err := f.Datasync(); err != nil {
				t.Fatal(err)
			}
		}
		wantContent(t, f, want)
		if t.Failed() {
			t.Fatalf("seed %d, step %d", seed, i)
		}
	}
}

func testConcurrent(t *testing.T, f File) {
	const workers, size = 8, 32 << 10
	if err := f.Truncate(workers * size); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range 50 {
				data := pattern(size, byte(w*50+i))
				if _, err := f.WriteAt(data, int64(w*size)); err != nil {
					t.Errorf("WriteAt: %v", err)
				}
				if i%10 == 0 {
					if err := f.Datasync(); err != nil {
						t.Errorf("Datasync: %v", err)
					}
				}
				got := make([]byte, size)
				if _, err := f.ReadAt(got, int64(w*size)); err != nil && err != io.EOF {
					t.Errorf("ReadAt: %v", err)
				}
				if !bytes.Equal(got, data) {
					t.Errorf("worker %d reads other bytes than it wrote", w)
				}
			}
		})
	}
	wg.Wait()
}
