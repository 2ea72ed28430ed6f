package meter

import (
	"context"
	"syscall"

	"csi-qcow2/nbdexport"
)

// A Backend passes requests on to another and counts them.
type Backend struct {
	next nbdexport.Backend
	m    *Meter
}

var (
	_ nbdexport.Backend        = (*Backend)(nil)
	_ nbdexport.FastZeroer     = (*Backend)(nil)
	_ nbdexport.Cacher         = (*Backend)(nil)
	_ nbdexport.SparseReader   = (*Backend)(nil)
	_ nbdexport.GranularWriter = (*Backend)(nil)
	_ nbdexport.AlignedWriter  = (*Backend)(nil)
)

// NewBackend returns a Backend that counts in m what it passes to next.
func NewBackend(next nbdexport.Backend, m *Meter) *Backend { return &Backend{next, m} }

// ReadAt implements nbdexport.Backend.
func (b *Backend) ReadAt(p []byte, off int64) (int, error) {
	s, begun := b.m.begin(Read, off)
	n, err := b.next.ReadAt(p, off)
	s.end(begun, int64(len(p)), err)
	return n, err
}

// WriteAt implements nbdexport.Backend.
func (b *Backend) WriteAt(p []byte, off int64) (int, error) {
	s, begun := b.m.begin(Write, off)
	n, err := b.next.WriteAt(p, off)
	s.end(begun, int64(len(p)), err)
	return n, err
}

// WriteZeroes implements nbdexport.Backend.
func (b *Backend) WriteZeroes(off, n int64, unmap bool) error {
	s, begun := b.m.begin(WriteZeroes, off)
	err := b.next.WriteZeroes(off, n, unmap)
	s.end(begun, n, err)
	return err
}

// WriteZeroesFast implements nbdexport.FastZeroer.
func (b *Backend) WriteZeroesFast(off, n int64, unmap bool) error {
	f, ok := b.next.(nbdexport.FastZeroer)
	if !ok {
		return syscall.EOPNOTSUPP
	}
	s, begun := b.m.begin(WriteZeroes, off)
	err := f.WriteZeroesFast(off, n, unmap)
	s.end(begun, n, err)
	return err
}

// Discard implements nbdexport.Backend.
func (b *Backend) Discard(off, n int64) error {
	s, begun := b.m.begin(Discard, off)
	err := b.next.Discard(off, n)
	s.end(begun, n, err)
	return err
}

// Flush implements nbdexport.Backend.
func (b *Backend) Flush() error {
	s, begun := b.m.begin(Flush, 0)
	err := b.next.Flush()
	s.end(begun, 0, err)
	return err
}

// BlockStatus implements nbdexport.Backend.
func (b *Backend) BlockStatus(ctx context.Context, off, n int64) (nbdexport.Extent, error) {
	return b.next.BlockStatus(ctx, off, n)
}

// Size implements nbdexport.Backend.
func (b *Backend) Size() int64 { return b.next.Size() }

// Cache implements nbdexport.Cacher.
func (b *Backend) Cache(off, n int64) error {
	if c, ok := b.next.(nbdexport.Cacher); ok {
		return c.Cache(off, n)
	}
	return nil
}

// SparseReads implements nbdexport.SparseReader.
func (b *Backend) SparseReads() bool {
	s, ok := b.next.(nbdexport.SparseReader)
	return ok && s.SparseReads()
}

// WriteGranule implements nbdexport.GranularWriter.
func (b *Backend) WriteGranule() int64 {
	if g, ok := b.next.(nbdexport.GranularWriter); ok {
		return g.WriteGranule()
	}
	return 0
}

// WantsAligned implements nbdexport.AlignedWriter.
func (b *Backend) WantsAligned() bool {
	a, ok := b.next.(nbdexport.AlignedWriter)
	return ok && a.WantsAligned()
}
