package qcow2

import "context"

// BlockStatus implements Disk. It reads L1 and L2 tables, no data; where no L2
// table exists a step covers the whole range of one.
func (im *Image) BlockStatus(ctx context.Context, off, n int64) (Extent, error) {
	if err := im.checkRange(off, n); err != nil {
		return Extent{}, err
	}
	slot := im.epochs.enter()
	defer im.epochs.exit(slot)
	if im.closed.Load() {
		return Extent{}, ErrClosed
	}
	l1 := im.l1.Load()
	ext, err := im.status(ctx, l1, off, n)
	for err == nil && ext.Len < n {
		if err = ctx.Err(); err != nil {
			break
		}
		var next Extent
		if next, err = im.status(ctx, l1, ext.End(), n-ext.Len); err != nil || !ext.joins(next) {
			break // an error belongs to a later call, which starts there
		}
		ext.Len += next.Len
	}
	if ext.Len > 0 && ctx.Err() == nil {
		err = nil
	}
	return ext, err
}

// joins reports whether next, which begins where e ends, is of the same state.
func (e Extent) joins(next Extent) bool {
	if e.Allocated != next.Allocated || e.Data != next.Data || e.Zero != next.Zero ||
		e.Compressed != next.Compressed || e.Depth != next.Depth || e.File != next.File {
		return false
	}
	if e.HostOff < 0 || next.HostOff < 0 {
		return e.HostOff == next.HostOff
	}
	return e.HostOff+e.Len == next.HostOff
}

// status returns the extent of the first run at off.
func (im *Image) status(ctx context.Context, l1 *l1Table, off, n int64) (Extent, error) {
	m, err := im.lookup(l1, off, n)
	if err != nil {
		return Extent{}, err
	}
	ext := Extent{Off: off, Len: m.n, Allocated: true, HostOff: -1}
	switch m.kind {
	case kindNormal:
		ext.Data, ext.HostOff, ext.File = true, int64(m.host), im.name
	case kindCompressed:
		ext.Data, ext.Compressed = true, true
	case kindZero:
		ext.Zero = true
	case kindZeroAllocated:
		ext.Zero, ext.HostOff, ext.File = true, int64(m.host), im.name
	case kindUnallocated:
		return im.backingStatus(ctx, off, m.n)
	}
	return ext, nil
}

// backingStatus describes [off, off+n), which this image leaves to its backing file.
func (im *Image) backingStatus(ctx context.Context, off, n int64) (Extent, error) {
	b := im.base()
	if b == nil || off >= b.Size() {
		return Extent{Off: off, Len: n, Zero: true, HostOff: -1}, nil
	}
	ext, err := b.BlockStatus(ctx, off, min(n, b.Size()-off))
	ext.Depth++
	return ext, err
}
