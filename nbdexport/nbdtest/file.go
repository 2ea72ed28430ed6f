// Package nbdtest has backends for tests of what is built on package nbdexport.
package nbdtest

import (
	"context"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
)

// FileBackend is a raw file as a backend. It counts what it is asked to do, and can be told to fail.
type FileBackend struct {
	Reads, Writes, Flushes    atomic.Int64
	Zeroed, Unmapped, Trimmed atomic.Int64 // bytes of WriteZeroes, of those with unmap, and of Discard

	// WriteError and FlushError, when set, are what changes and Flush return.
	WriteError, FlushError atomic.Pointer[error]

	f    *os.File
	size atomic.Int64
}

var _ nbdexport.Backend = (*FileBackend)(nil)

// NewFileBackend returns a backend over a new, sparse file of size bytes.
func NewFileBackend(path string, size int64) (*FileBackend, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	b := &FileBackend{f: f}
	if err := b.Grow(size); err != nil {
		f.Close()
		return nil, err
	}
	return b, nil
}

// OpenFileBackend returns a backend over an existing file.
func OpenFileBackend(path string) (*FileBackend, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	b := &FileBackend{f: f}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	b.size.Store(fi.Size())
	return b, nil
}

// Grow makes the backend size bytes long.
func (b *FileBackend) Grow(size int64) error {
	if err := b.f.Truncate(size); err != nil {
		return err
	}
	b.size.Store(size)
	return nil
}

// Close closes the file.
func (b *FileBackend) Close() error { return b.f.Close() }

func failure(p *atomic.Pointer[error]) error {
	if err := p.Load(); err != nil {
		return *err
	}
	return nil
}

// ReadAt implements nbdexport.Backend.
func (b *FileBackend) ReadAt(p []byte, off int64) (int, error) {
	b.Reads.Add(1)
	n, err := b.f.ReadAt(p, off)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// WriteAt implements nbdexport.Backend.
func (b *FileBackend) WriteAt(p []byte, off int64) (int, error) {
	b.Writes.Add(1)
	if err := failure(&b.WriteError); err != nil {
		return 0, err
	}
	return b.f.WriteAt(p, off)
}

// WriteZeroes implements nbdexport.Backend.
func (b *FileBackend) WriteZeroes(off, n int64, unmap bool) error {
	b.Zeroed.Add(n)
	if err := failure(&b.WriteError); err != nil {
		return err
	}
	if unmap {
		b.Unmapped.Add(n)
		return unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	}
	zeroes := make([]byte, min(n, 1<<20))
	for ; n > 0; n -= int64(len(zeroes)) {
		zeroes = zeroes[:min(n, int64(len(zeroes)))]
		if _, err := b.f.WriteAt(zeroes, off); err != nil {
			return err
		}
		off += int64(len(zeroes))
	}
	return nil
}

// Discard implements nbdexport.Backend.
func (b *FileBackend) Discard(off, n int64) error {
	b.Trimmed.Add(n)
	if err := failure(&b.WriteError); err != nil {
		return err
	}
	return unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// Flush implements nbdexport.Backend.
func (b *FileBackend) Flush() error {
	b.Flushes.Add(1)
	if err := failure(&b.FlushError); err != nil {
		return err
	}
	return unix.Fdatasync(int(b.f.Fd()))
}

// BlockStatus implements nbdexport.Backend: all is data.
func (b *FileBackend) BlockStatus(_ context.Context, _, n int64) (nbdexport.Extent, error) {
	return nbdexport.Extent{Len: n, Depth: 1}, nil
}

// Size implements nbdexport.Backend.
func (b *FileBackend) Size() int64 { return b.size.Load() }
