package imagefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"

	"csi-qcow2/qcow2"
)

// A diskFile is the content of a disk as the file of another image.
type diskFile struct {
	disk qcow2.Disk
	name string
}

var _ qcow2.File = (*diskFile)(nil)

// Name returns the name of the image.
func (f *diskFile) Name() string { return f.name }

// ReadAt implements qcow2.File: unlike a disk, a file ends with io.EOF.
func (f *diskFile) ReadAt(p []byte, off int64) (int, error) {
	left := f.disk.Size() - off
	if off < 0 || left >= int64(len(p)) {
		return f.disk.ReadAt(p, off)
	}
	if left <= 0 {
		return 0, io.EOF
	}
	n, err := f.disk.ReadAt(p[:left], off)
	if err == nil {
		err = io.EOF
	}
	return n, err
}

// Size implements qcow2.File.
func (f *diskFile) Size() (int64, error) { return f.disk.Size(), nil }

// Close implements qcow2.File.
func (f *diskFile) Close() error { return f.disk.Close() }

// WriteAt implements qcow2.File; it refuses.
func (f *diskFile) WriteAt([]byte, int64) (int, error) { return 0, qcow2.ErrReadOnly }

// WritevAt implements qcow2.File; it refuses.
func (f *diskFile) WritevAt([][]byte, int64) (int, error) { return 0, qcow2.ErrReadOnly }

// Datasync implements qcow2.File; nothing was written.
func (f *diskFile) Datasync() error { return nil }

// Truncate implements qcow2.File; it refuses.
func (f *diskFile) Truncate(int64) error { return qcow2.ErrReadOnly }

// Punch implements qcow2.File; it refuses.
func (f *diskFile) Punch(int64, int64) error { return errors.ErrUnsupported }

// Allocate implements qcow2.File; it refuses.
func (f *diskFile) Allocate(int64, int64) error { return errors.ErrUnsupported }

// An absentDisk stands for a backing file that was left closed. It has every
// size, so that reading it fails instead of giving the zeroes beyond its end.
type absentDisk struct{ name string }

var _ qcow2.Disk = absentDisk{}

func (d absentDisk) err() error { return fmt.Errorf("%w: %q", ErrNotOpened, d.name) }

// ReadAt implements qcow2.Disk.
func (d absentDisk) ReadAt([]byte, int64) (int, error) { return 0, d.err() }

// WriteAt implements qcow2.Disk.
func (d absentDisk) WriteAt([]byte, int64) (int, error) { return 0, qcow2.ErrReadOnly }

// WriteZeroes implements qcow2.Disk.
func (d absentDisk) WriteZeroes(int64, int64, bool) error { return qcow2.ErrReadOnly }

// Discard implements qcow2.Disk.
func (d absentDisk) Discard(int64, int64) error { return qcow2.ErrReadOnly }

// Flush implements qcow2.Disk.
func (d absentDisk) Flush() error { return nil }

// BlockStatus implements qcow2.Disk.
func (d absentDisk) BlockStatus(context.Context, int64, int64) (qcow2.Extent, error) {
	return qcow2.Extent{}, d.err()
}

// Size implements qcow2.Disk.
func (d absentDisk) Size() int64 { return math.MaxInt64 >> 1 }

// Close implements qcow2.Disk.
func (d absentDisk) Close() error { return nil }
