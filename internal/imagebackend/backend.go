package imagebackend

import (
	"context"
	"syscall"

	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
)

// Options say how New wraps an image. The zero value passes everything on.
type Options struct {
	// IgnoreDiscard makes Discard succeed without doing anything, and keeps
	// the space of zeroes.
	IgnoreDiscard bool
	// Direct says that the image's host files were opened with O_DIRECT: the
	// server then passes aligned memory only.
	Direct bool
}

// A Backend serves a Disk. It implements nbdexport.Backend and the optional
// interfaces beside it.
type Backend struct {
	disk     qcow2.Disk
	opts     Options
	fastZero bool // zeroes cost metadata only
	sparse   bool // so does BlockStatus
	granule  int64
}

var (
	_ nbdexport.Backend        = (*Backend)(nil)
	_ nbdexport.FastZeroer     = (*Backend)(nil)
	_ nbdexport.SparseReader   = (*Backend)(nil)
	_ nbdexport.AlignedWriter  = (*Backend)(nil)
	_ nbdexport.GranularWriter = (*Backend)(nil)
)

// New returns a Backend of d, which stays the caller's to close.
func New(d qcow2.Disk, o Options) *Backend {
	b := &Backend{disk: d, opts: o}
	if im, ok := d.(interface{ Info() qcow2.Info }); ok { // an image, in whatever cache mode
		info := im.Info()
		b.fastZero = info.Version >= 3 // version 2 has no zero clusters
		b.sparse = true
		b.granule = info.ClusterSize
	}
	return b
}

// ReadAt implements nbdexport.Backend.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.disk.ReadAt(p, off)
	return n, withErrno(err)
}

// WriteAt implements nbdexport.Backend.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	n, err := b.disk.WriteAt(p, off)
	return n, withErrno(err)
}

// WriteZeroes implements nbdexport.Backend.
func (b *Backend) WriteZeroes(off, n int64, unmap bool) error {
	return withErrno(b.disk.WriteZeroes(off, n, unmap && !b.opts.IgnoreDiscard))
}

// WriteZeroesFast implements nbdexport.FastZeroer.
func (b *Backend) WriteZeroesFast(off, n int64, unmap bool) error {
	if !b.fastZero {
		return syscall.EOPNOTSUPP
	}
	return b.WriteZeroes(off, n, unmap)
}

// Discard implements nbdexport.Backend.
func (b *Backend) Discard(off, n int64) error {
	if b.opts.IgnoreDiscard {
		return nil
	}
	return withErrno(b.disk.Discard(off, n))
}

// Flush implements nbdexport.Backend.
func (b *Backend) Flush() error { return withErrno(b.disk.Flush()) }

// BlockStatus implements nbdexport.Backend.
func (b *Backend) BlockStatus(ctx context.Context, off, n int64) (nbdexport.Extent, error) {
	e, err := b.disk.BlockStatus(ctx, off, n)
	if err != nil {
		return nbdexport.Extent{}, withErrno(err)
	}
	out := nbdexport.Extent{Len: e.End() - off, Hole: !e.Data, Zero: e.Zero}
	if e.Allocated {
		out.Depth = e.Depth + 1
	}
	return out, nil
}

// Size implements nbdexport.Backend.
func (b *Backend) Size() int64 { return b.disk.Size() }

// SparseReads implements nbdexport.SparseReader.
func (b *Backend) SparseReads() bool { return b.sparse }

// WriteGranule implements nbdexport.GranularWriter: a cluster that is allocated may
// be copied as a whole.
func (b *Backend) WriteGranule() int64 { return b.granule }

// WantsAligned implements nbdexport.AlignedWriter.
func (b *Backend) WantsAligned() bool { return b.opts.Direct }
