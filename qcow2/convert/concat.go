package convert

import (
	"context"
	"errors"
	"fmt"
	"sort"

	"csi-qcow2/qcow2"
)

// A concat is several disks one after another. It is read-only.
type concat struct {
	disks []qcow2.Disk
	ends  []int64 // where each disk ends
}

// Concat returns a read-only disk that is disks one after another. Closing it
// closes them.
func Concat(disks ...qcow2.Disk) qcow2.Disk {
	c := &concat{disks: disks}
	end := int64(0)
	for _, d := range disks {
		end += d.Size()
		c.ends = append(c.ends, end)
	}
	return c
}

// at returns the disk that holds off, the offset in it, and how many of n bytes
// from there it holds.
func (c *concat) at(off, n int64) (qcow2.Disk, int64, int64) {
	i := sort.Search(len(c.ends), func(i int) bool { return off < c.ends[i] })
	start := c.ends[i] - c.disks[i].Size()
	return c.disks[i], off - start, min(n, c.ends[i]-off)
}

// Size implements qcow2.Disk.
func (c *concat) Size() int64 {
	if len(c.ends) == 0 {
		return 0
	}
	return c.ends[len(c.ends)-1]
}

// ReadAt implements qcow2.Disk.
func (c *concat) ReadAt(p []byte, off int64) (int, error) {
	if err := c.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		d, at, n := c.at(off+int64(done), int64(len(p)-done))
		if _, err := d.ReadAt(p[done:done+int(n)], at); err != nil {
			return done, err
		}
		done += int(n)
	}
	return done, nil
}

// BlockStatus implements qcow2.Disk.
func (c *concat) BlockStatus(ctx context.Context, off, n int64) (qcow2.Extent, error) {
	return c.status(ctx, off, n, func(d qcow2.Disk) statusFunc { return d.BlockStatus })
}

// SparseStatus is that of the disks.
func (c *concat) SparseStatus(ctx context.Context, off, n int64) (qcow2.Extent, error) {
	return c.status(ctx, off, n, sparseStatus)
}

func (c *concat) status(ctx context.Context, off, n int64, of func(qcow2.Disk) statusFunc) (qcow2.Extent, error) {
	if err := c.checkRange(off, n); err != nil || n == 0 {
		return qcow2.Extent{}, errors.Join(err, ctx.Err())
	}
	d, at, n := c.at(off, n)
	e, err := of(d)(ctx, at, n)
	e.Off = off
	return e, err
}

func (c *concat) checkRange(off, n int64) error {
	if size := c.Size(); off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: %d bytes at %#x of %d", qcow2.ErrOutOfRange, n, off, size)
	}
	return nil
}

// WriteAt implements qcow2.Disk; it refuses.
func (c *concat) WriteAt([]byte, int64) (int, error) { return 0, qcow2.ErrReadOnly }

// WriteZeroes implements qcow2.Disk; it refuses.
func (c *concat) WriteZeroes(int64, int64, bool) error { return qcow2.ErrReadOnly }

// Discard implements qcow2.Disk; it refuses.
func (c *concat) Discard(int64, int64) error { return qcow2.ErrReadOnly }

// Flush implements qcow2.Disk; nothing was written.
func (c *concat) Flush() error { return nil }

// Close implements qcow2.Disk.
func (c *concat) Close() error {
	var errs []error
	for _, d := range c.disks {
		errs = append(errs, d.Close())
	}
	return errors.Join(errs...)
}
