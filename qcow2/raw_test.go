package qcow2

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// TestRawAgainstBytes does random requests on file systems that can and cannot
// zero a range, and compares content and block status with a byte slice.
func TestRawAgainstBytes(t *testing.T) {
	for where, dir := range diskDirs(t) {
		for _, pass := range []bool{false, true} {
			f := newOSFile(t, filepath.Join(dir, where), FileOptions{})
			const size = 1<<20 + 700 // not a multiple of anything
			if err := f.Truncate(size); err != nil {
				t.Fatal(err)
			}
			r, err := OpenRaw(f, RawOptions{PassDiscard: pass})
			if err != nil {
				t.Fatal(err)
			}
			if want := int64(size+511) &^ 511; r.Size() != want {
				t.Fatalf("Size() = %d, want %d", r.Size(), want)
			}
			want := make([]byte, r.Size())
			rng := rand.New(rand.NewPCG(5, 5))
			for range 200 {
				off := rng.Int64N(r.Size())
				n := min(1+rng.Int64N(1<<rng.IntN(18)), r.Size()-off)
				switch rng.IntN(4) {
				case 0, 1:
					p := bytes.Repeat([]byte{byte(rng.Uint32())}, int(n))
					_, err = r.WriteAt(p, off)
					copy(want[off:], p)
				case 2:
					err = r.WriteZeroes(off, n, rng.IntN(2) == 0)
					clear(want[off : off+n])
				case 3:
					err = r.Discard(off, n)
					if pass {
						clear(want[off : off+n])
					}
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Flush(); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, r.Size())
			if _, err := r.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s, PassDiscard %v: wrong content (%v)", where, pass, err)
			}
			for off := int64(0); off < r.Size(); {
				e, err := r.BlockStatus(t.Context(), off, r.Size()-off)
				if err != nil || e.Off != off || e.Len <= 0 || e.Data == e.Zero || e.HostOff != off {
					t.Fatalf("BlockStatus(%#x) = %+v, %v", off, e, err)
				}
				if e.Zero && !bytes.Equal(want[off:e.End()], make([]byte, e.Len)) {
					t.Fatalf("%+v is not zero", e)
				}
				off = e.End()
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestRawResizeAndRefusals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	r, err := OpenRaw(newOSFile(t, path, FileOptions{}), RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Resize(t.Context(), 4096); err != nil || r.Size() != 4096 {
		t.Fatalf("Resize: %v, size %d", err, r.Size())
	}
	for _, tt := range []struct {
		off, n int64
		want   error
	}{{0, 4096, nil}, {4096, 0, nil}, {4096, 1, ErrOutOfRange}, {1, 4096, ErrOutOfRange}, {-1, 1, ErrOutOfRange}, {1 << 62, 1, ErrOutOfRange}} {
		p := make([]byte, tt.n)
		_, rerr := r.ReadAt(p, tt.off)
		_, werr := r.WriteAt(p, tt.off)
		for _, err := range []error{rerr, werr, r.WriteZeroes(tt.off, tt.n, true), r.Discard(tt.off, tt.n)} {
			if !errors.Is(err, tt.want) {
				t.Errorf("%d bytes at %d: %v, want %v", tt.n, tt.off, err, tt.want)
			}
		}
	}
	if _, err := r.BlockStatus(t.Context(), 0, 0); !errors.Is(err, ErrOutOfRange) {
		t.Errorf("BlockStatus of nothing: %v", err)
	}
	if err := r.Resize(t.Context(), -1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Resize(-1): %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}

	f, err := OpenFile(path, FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	ro, err := OpenRaw(f, RawOptions{ReadOnly: true, Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	got := bytes.Repeat([]byte{1}, 1<<20)
	if _, err := ro.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, 1<<20)) {
		t.Errorf("beyond the end of the file: %v, or not zero", err)
	}
	_, werr := ro.WriteAt(got, 0)
	for _, err := range []error{werr, ro.WriteZeroes(0, 1, true), ro.Discard(0, 1), ro.Resize(t.Context(), 1)} {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("a change: %v, want ErrReadOnly", err)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 4096 {
		t.Errorf("the file has changed: %v, %v", st, err)
	}
}
