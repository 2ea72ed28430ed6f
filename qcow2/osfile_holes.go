package qcow2

import "context"

// sparseStep is how much data SparseStatus reports at once: it looks for a hole
// only where a step begins. Asking for the end of the data would be exact, but
// tmpfs walks every page up to it, which costs a third of the copy.
const sparseStep = 1 << 20

// SparseStatus is BlockStatus, but data that is a hole in its host file, as in
// an image with preallocated metadata, counts as zero too: the extent then has
// Data, Zero and HostOff set, as QEMU reports it. It is for copies, which save
// the read.
func (im *Image) SparseStatus(ctx context.Context, off, n int64) (Extent, error) {
	// Inside the epoch no cluster that the mapping names can be freed and
	// punched before its hole is looked for.
	slot := im.epochs.enter()
	defer im.epochs.exit(slot)
	ext, err := im.BlockStatus(ctx, off, min(n, sparseStep))
	if err != nil {
		return ext, err
	}
	if !ext.Data || ext.HostOff < 0 {
		return im.BlockStatus(ctx, off, n)
	}
	f := im.holder(ext.Depth)
	if f == nil {
		return ext, nil
	}
	next, err := f.DataAfter(ext.HostOff)
	if err != nil || next == ext.HostOff {
		return ext, err
	}
	hole, err := im.BlockStatus(ctx, off, min(n, next-ext.HostOff))
	if err == nil && hole.HostOff == ext.HostOff && hole.Depth == ext.Depth {
		hole.Zero = true // else it was written meanwhile, elsewhere
	}
	return hole, err
}

// A holeFinder is a host file that knows its holes.
type holeFinder interface {
	DataAfter(off int64) (int64, error)
}

// holder returns the host file of the image at depth of the chain, nil if it
// cannot tell its holes. A raw disk looks for them itself.
func (im *Image) holder(depth int) holeFinder {
	for range depth {
		next, ok := im.base().(*Image)
		if !ok {
			return nil
		}
		im = next
	}
	f, _ := im.f.(holeFinder)
	return f
}
