package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
)

// RawOptions say how OpenRaw opens a raw image. The zero value opens
// read-write and does not pass discards on.
type RawOptions struct {
	// ReadOnly refuses everything that changes the file.
	ReadOnly bool
	// Size, if not 0, is the virtual size in bytes instead of the file size.
	// Bytes beyond the end of the file read as zeroes.
	Size int64
	// PassDiscard gives discarded space back to the host file; otherwise
	// Discard does nothing, and WriteZeroes keeps the space.
	PassDiscard bool
	// NoFlush makes Flush return at once: cache=unsafe of the tools.
	NoFlush bool
}

// A Raw is a disk whose content is a host file, byte for byte. It implements Disk.
type Raw struct {
	f    File
	name string
	opts RawOptions
	size atomic.Int64

	// What f can do beyond File; nil when it cannot.
	nextData  func(off, end int64) (start, stop int64, err error)
	zeroRange func(off, n int64) error
}

var _ Disk = (*Raw)(nil)

// rawSectorBytes is the unit of a raw disk's virtual size, as in QEMU: a file
// of 700 bytes is a disk of 1024, the rest zeroes.
const rawSectorBytes = 512

// OpenRaw opens f as a raw image. On success the disk owns f and Close closes it.
func OpenRaw(f File, o RawOptions) (*Raw, error) {
	r := &Raw{f: f, opts: o}
	size := o.Size
	if size == 0 {
		fileSize, err := f.Size()
		if err != nil {
			return nil, err
		}
		size = (fileSize + rawSectorBytes - 1) &^ (rawSectorBytes - 1)
	}
	if size < 0 || size > maxVirtualSize {
		return nil, fmt.Errorf("%w: raw image of %d bytes", ErrTooLarge, size)
	}
	r.size.Store(size)
	if f, ok := f.(interface{ Name() string }); ok {
		r.name = f.Name()
	}
	if f, ok := f.(interface {
		NextData(off, end int64) (start, stop int64, err error)
	}); ok {
		r.nextData = f.NextData
	}
	if f, ok := f.(interface{ ZeroRange(off, n int64) error }); ok {
		r.zeroRange = f.ZeroRange
	}
	return r, nil
}

// File returns the file that holds the bytes.
func (r *Raw) File() File { return r.f }

// Size implements Disk.
func (r *Raw) Size() int64 { return r.size.Load() }

// Close flushes and closes the file.
func (r *Raw) Close() error {
	var err error
	if !r.opts.ReadOnly {
		err = r.Flush()
	}
	return errors.Join(err, r.f.Close())
}

// ReadAt implements Disk.
func (r *Raw) ReadAt(p []byte, off int64) (int, error) {
	if err := r.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	n, err := r.f.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	clear(p[n:]) // beyond the end of the file
	return len(p), nil
}

// WriteAt implements Disk.
func (r *Raw) WriteAt(p []byte, off int64) (int, error) {
	if err := r.checkChange(off, int64(len(p))); err != nil {
		return 0, err
	}
	return r.f.WriteAt(p, off)
}

// WriteZeroes implements Disk. Where the host can neither punch nor zero a
// range, it writes zeroes.
func (r *Raw) WriteZeroes(off, n int64, unmap bool) error {
	if err := r.checkChange(off, n); err != nil {
		return err
	}
	if n == 0 {
		return nil
	}
	err := errors.ErrUnsupported
	if unmap && r.opts.PassDiscard {
		err = r.f.Punch(off, n)
	} else if r.zeroRange != nil {
		err = r.zeroRange(off, n)
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	zeroes := GetBuffer(int(min(n, maxBounceBytes)))
	defer PutBuffer(zeroes)
	clear(zeroes)
	for n > 0 {
		chunk := zeroes[:min(n, int64(len(zeroes)))]
		if _, err := r.f.WriteAt(chunk, off); err != nil {
			return err
		}
		off += int64(len(chunk))
		n -= int64(len(chunk))
	}
	return nil
}

// Discard implements Disk. It does nothing unless PassDiscard was asked for
// and the host can punch holes.
func (r *Raw) Discard(off, n int64) error {
	if err := r.checkChange(off, n); err != nil {
		return err
	}
	if n == 0 || !r.opts.PassDiscard {
		return nil
	}
	if err := r.f.Punch(off, n); !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}

// Flush implements Disk.
func (r *Raw) Flush() error {
	if r.opts.NoFlush || r.opts.ReadOnly {
		return nil
	}
	return r.f.Datasync()
}

// BlockStatus implements Disk. Holes of the host file read as zeroes; like
// data they have a host offset.
func (r *Raw) BlockStatus(_ context.Context, off, n int64) (Extent, error) {
	if err := r.checkRange(off, n); err != nil {
		return Extent{}, err
	}
	if n == 0 {
		return Extent{}, fmt.Errorf("%w: empty range at %#x", ErrOutOfRange, off)
	}
	e := Extent{Off: off, Len: n, Allocated: true, HostOff: off, File: r.name}
	if r.nextData == nil {
		e.Data = true
		return e, nil
	}
	start, stop, err := r.nextData(off, off+n)
	if err != nil {
		return Extent{}, err
	}
	if start > off {
		e.Zero, e.Len = true, start-off
		return e, nil
	}
	e.Data, e.Len = true, stop-off
	return e, nil
}

// Resize changes the virtual size to size bytes, which must be a multiple of
// 512. The change is durable when it returns. Nothing may be using bytes that
// are cut off.
func (r *Raw) Resize(_ context.Context, size int64) error {
	if r.opts.ReadOnly {
		return ErrReadOnly
	}
	if size < 0 || size > maxVirtualSize {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	if err := r.f.Truncate(size); err != nil {
		return err
	}
	r.size.Store(size)
	return r.f.Datasync()
}

// checkRange returns ErrOutOfRange unless [off, off+n) lies inside the disk.
func (r *Raw) checkRange(off, n int64) error {
	if size := r.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: %d bytes at %#x of %d", ErrOutOfRange, n, off, size)
	}
	return nil
}

// checkChange is checkRange for a request that changes the range.
func (r *Raw) checkChange(off, n int64) error {
	if r.opts.ReadOnly {
		return ErrReadOnly
	}
	return r.checkRange(off, n)
}
