package qcow2

import (
	"context"
	"math"
)

// SparseStatus is BlockStatus, but data that is a hole in its host file, as in
// an image with preallocated metadata, counts as zero too. It costs a look
// into the host file's own map, so it is for copies, which save the read.
//
// The extent has Data, Zero and HostOff set then, as QEMU reports it.
func (im *Image) SparseStatus(ctx context.Context, off, n int64) (Extent, error) {
	// Inside the epoch no cluster that the mapping names can be freed and
	// punched before its hole is looked for.
	slot := im.epochs.enter()
	defer im.epochs.exit(slot)
	ext, err := im.BlockStatus(ctx, off, n)
	if err != nil || !ext.Data || ext.HostOff < 0 {
		return ext, err
	}
	level := im
	for range ext.Depth {
		next, ok := level.backing.(*Image)
		if !ok {
			return ext, nil // a raw disk has looked itself
		}
		level = next
	}
	f, ok := level.f.(interface {
		MaybeData(off, end int64) (start, stop int64, err error)
	})
	if !ok {
		return ext, nil
	}
	start, stop, err := f.MaybeData(ext.HostOff, ext.HostOff+ext.Len)
	if err != nil {
		return Extent{}, err
	}
	if start > ext.HostOff {
		ext.Zero, ext.Len = true, start-ext.HostOff
	} else {
		ext.Len = stop - ext.HostOff
	}
	return ext, nil
}

// A dataRange is a range [start, stop) of a host file.
type dataRange struct{ start, stop int64 }

// MaybeData is NextData, but may say data of what was data when it last looked.
// Some file systems, tmpfs among them, walk all pages up to the next hole: of a
// file without holes each look would cost its whole length.
func (f *OSFile) MaybeData(off, end int64) (start, stop int64, err error) {
	if known := f.known.Load(); known != nil && known.start <= off && off < known.stop {
		return off, min(known.stop, end), nil
	}
	start, stop, err = f.NextData(off, math.MaxInt64)
	if err != nil {
		return 0, 0, err
	}
	f.known.Store(&dataRange{start, stop})
	return min(start, end), min(stop, end), nil
}
