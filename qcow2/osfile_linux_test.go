package qcow2

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// diskDirs are directories on different file systems: tmpfs cannot zero a
// range, and not every file system does direct I/O alike.
func diskDirs(t *testing.T) map[string]string {
	t.Helper()
	shm, err := os.MkdirTemp("/dev/shm", "osfile")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	return map[string]string{"temp": t.TempDir(), "shm": shm}
}

func newOSFile(t *testing.T, path string, o FileOptions) *OSFile {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestOSFileAgainstBytes does random requests, aligned and not, and compares
// the file with a byte slice after each.
func TestOSFileAgainstBytes(t *testing.T) {
	for where, dir := range diskDirs(t) {
		for _, direct := range []bool{false, true} {
			name := where
			if direct {
				name += "-direct"
			}
			t.Run(name, func(t *testing.T) {
				f := newOSFile(t, filepath.Join(dir, name), FileOptions{Direct: direct})
				const maxSize = 3 << 20
				var want []byte // content of the file
				rng := rand.New(rand.NewPCG(1, 2))
				for step := range 300 {
					off := rng.Int64N(maxSize)
					n := rng.IntN(1 << rng.IntN(20))
					if rng.IntN(2) == 0 {
						off, n = off&^4095, (n+4095)&^4095
					}
					p := GetBuffer(n + 1)[rng.IntN(2):]
					p = p[:min(n, len(p))]
					for i := range p {
						p[i] = byte(rng.Uint32())
					}
					switch op := rng.IntN(5); op {
					case 0, 1:
						bufs := [][]byte{p}
						if op == 1 {
							bufs = nil
							for rest := p; len(rest) > 0; {
								k := 1 + rng.IntN(len(rest))
								bufs, rest = append(bufs, rest[:k]), rest[k:]
							}
						}
						if got, err := f.WritevAt(bufs, off); err != nil || got != len(p) {
							t.Fatalf("step %d: WritevAt(%d bytes, %#x) = %d, %v", step, len(p), off, got, err)
						}
						want = overwrite(want, p, off)
					case 2:
						if got, err := f.WriteAt(p, off); err != nil || got != len(p) {
							t.Fatalf("step %d: WriteAt(%d bytes, %#x) = %d, %v", step, len(p), off, got, err)
						}
						want = overwrite(want, p, off)
					case 3:
						if len(p) == 0 {
							continue
						}
						if err := f.Punch(off, int64(len(p))); err != nil {
							t.Fatalf("step %d: Punch: %v", step, err)
						}
						if off < int64(len(want)) {
							clear(want[off:min(off+int64(len(p)), int64(len(want)))])
						}
					case 4:
						got, err := f.ReadAt(p, off)
						wantN := max(0, min(len(p), len(want)-int(off)))
						if got != wantN || (err == io.EOF) != (wantN < len(p)) || err != nil && err != io.EOF {
							t.Fatalf("step %d: ReadAt(%d bytes, %#x) of %d = %d, %v; want %d", step, len(p), off, len(want), got, err, wantN)
						}
						if got > 0 && !bytes.Equal(p[:got], want[off:off+int64(got)]) {
							t.Fatalf("step %d: ReadAt(%d bytes, %#x): wrong bytes", step, len(p), off)
						}
					}
					if size, err := f.Size(); err != nil || size != int64(len(want)) {
						t.Fatalf("step %d: Size() = %d, %v; want %d", step, size, err, len(want))
					}
				}
				if err := f.Datasync(); err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(f.Name())
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("the file differs from what was written (%v)", err)
				}
			})
		}
	}
}

// overwrite returns b with p at off, zeroes between.
func overwrite(b, p []byte, off int64) []byte {
	if len(p) == 0 {
		return b
	}
	if end := int(off) + len(p); end > len(b) {
		b = append(b, make([]byte, end-len(b))...)
	}
	copy(b[off:], p)
	return b
}

// TestOSFileDirectNeighbours writes all parts of one block from many goroutines
// through the bounce buffer: none may undo another.
func TestOSFileDirectNeighbours(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{Direct: true})
	const parts, size = 16, 2 * 4096
	var wg sync.WaitGroup
	for i := range parts {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(i + 1)}, size/parts)
			for range 20 {
				if _, err := f.WriteAt(p, int64(i*len(p))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got := make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	for i, b := range got {
		if want := byte(i/(size/parts) + 1); b != want {
			t.Fatalf("byte %d = %d, want %d", i, b, want)
		}
	}
}

func TestOSFileWritevAtManyVectors(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{})
	var bufs [][]byte
	var want []byte
	for i := range 3 * maxVector {
		b := bytes.Repeat([]byte{byte(i)}, i%7)
		bufs, want = append(bufs, b), append(want, b...)
	}
	if n, err := f.WritevAt(bufs, 10); err != nil || n != len(want) {
		t.Fatalf("WritevAt = %d, %v; want %d", n, err, len(want))
	}
	got := make([]byte, len(want))
	if _, err := f.ReadAt(got, 10); err != nil || !bytes.Equal(got, want) {
		t.Errorf("wrong bytes (%v)", err)
	}
}

// TestOSFileShortWrite lets the kernel cut a vectored write at the file size
// limit, inside a vector: what fits is written and the rest is an error.
func TestOSFileShortWrite(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{})
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	const limit = 10000
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	bufs := [][]byte{make([]byte, 4096), make([]byte, 4096), make([]byte, 4096)}
	n, err := f.WritevAt(bufs, 0)
	if rerr := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); rerr != nil {
		t.Fatal(rerr)
	}
	if n != limit || !errors.Is(err, unix.EFBIG) {
		t.Errorf("WritevAt beyond the size limit = %d, %v; want %d, EFBIG", n, err, limit)
	}
}

func TestOSFileNextData(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{})
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 65536), 131072); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ off, end, start, stop int64 }{
		{0, 1 << 20, 131072, 196608},
		{0, 140000, 131072, 140000},
		{0, 131072, 131072, 131072},
		{140000, 1 << 20, 140000, 196608},
		{196608, 1 << 20, 1 << 20, 1 << 20},
		{1 << 20, 1 << 21, 1 << 21, 1 << 21},
	} {
		start, stop, err := f.NextData(tt.off, tt.end)
		if err != nil || start != tt.start || stop != tt.stop {
			t.Errorf("NextData(%d, %d) = %d, %d, %v; want %d, %d", tt.off, tt.end, start, stop, err, tt.start, tt.stop)
		}
	}
}

func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	link := filepath.Join(dir, "link")
	fifo := filepath.Join(dir, "fifo")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Symlink(file, link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		o          FileOptions
		want       error // nil: only that it fails
	}{
		{"missing", filepath.Join(dir, "none"), FileOptions{}, os.ErrNotExist},
		{"directory", dir, FileOptions{ReadOnly: true}, unix.EISDIR},
		{"link", link, FileOptions{NoFollow: true}, unix.ELOOP},
		{"fifo", fifo, FileOptions{}, nil},
		{"fifo read-only", fifo, FileOptions{ReadOnly: true}, nil},
	} {
		f, err := OpenFile(tt.path, tt.o)
		if err == nil {
			f.Close()
			t.Errorf("%s: opened", tt.name)
		} else if tt.want != nil && !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	f, err := OpenFile(link, FileOptions{})
	if err != nil {
		t.Fatalf("link: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadAt after Close: %v, want os.ErrClosed", err)
	}
}

// TestSyncThatFailedStaysFailed: a pipe cannot be synced.
func TestSyncThatFailedStaysFailed(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{})
	d, err := OpenRaw(f, RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	good := f.fd.Swap(int64(w.Fd()))
	if err := d.Flush(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("flush of a pipe: %v, want EINVAL", err)
	}
	f.fd.Store(good)
	if err := d.Flush(); !errors.Is(err, unix.EINVAL) {
		t.Errorf("flush after one that failed: %v, want its error", err)
	}
}

// TestOSFileSyncsAreShared calls Datasync while one runs, which does not cover what was
// written since: the next one does, for all who wait.
func TestOSFileSyncsAreShared(t *testing.T) {
	f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{})
	came := f.syncs.Load()
	for want := came + 1; want < came+4; want++ {
		if err := f.Datasync(); err != nil {
			t.Fatal(err)
		}
		if got := f.syncs.Load(); got != want {
			t.Errorf("%d syncs have begun, want %d", got, want)
		}
	}
	for range 3 { // who came before them, and waited
		if err := f.datasyncAfter(came); err != nil {
			t.Fatal(err)
		}
	}
	if got := f.syncs.Load(); got != came+3 {
		t.Errorf("%d syncs have begun, want %d", got, came+3)
	}
}
