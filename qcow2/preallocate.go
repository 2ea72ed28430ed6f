package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
)

const (
	createStep   = 1 << 20 // bytes of one write of Create
	allocateStep = 1 << 30 // bytes of one Allocate, so that ctx is looked at
)

// writeTables writes the tables of a new image. The file is already as long as
// the layout and reads as zeroes: what is 0 is not written and stays sparse.
func (l *layout) writeTables(ctx context.Context, f File) error {
	for _, t := range []struct {
		at    hostCluster
		words int64
		word  func(i int64) uint64
	}{
		{l.refblocks, l.refcountWords(), l.refcountWord},
		{l.reftable, l.refblockCount, l.reftableWord},
		{l.l1, l.l2Count, l.l1Word},
		{l.l2, l.dataCount, l.l2Word},
	} {
		if err := writeWords(ctx, f, int64(l.g.hostOffset(t.at)), t.words, t.word); err != nil {
			return err
		}
	}
	return nil
}

// writeWords writes words big endian at off, in large steps.
func writeWords(ctx context.Context, f File, off, words int64, word func(i int64) uint64) error {
	buf := make([]byte, min(words*8, createStep))
	for i := int64(0); i < words; {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), (words-i)*8)]
		for j := 0; j < len(b); j += 8 {
			binary.BigEndian.PutUint64(b[j:], word(i))
			i++
		}
		if _, err := f.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
	}
	return nil
}

// preallocateData gives the data clusters the host space that mode asks for.
func (l *layout) preallocateData(ctx context.Context, f File, mode Preallocation) error {
	off, end := int64(l.g.hostOffset(l.data)), int64(l.g.hostOffset(l.end))
	switch mode {
	case PreallocationFalloc:
		for ; off < end; off += allocateStep {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f.Allocate(off, min(allocateStep, end-off)); err != nil {
				return fmt.Errorf("qcow2: preallocation %q: %w; use %q or %q", mode, err, PreallocationFull, PreallocationMetadata)
			}
		}
	case PreallocationFull:
		zeroes := make([]byte, min(createStep, end-off))
		for ; off < end; off += int64(len(zeroes)) {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, err := f.WriteAt(zeroes[:min(int64(len(zeroes)), end-off)], off); err != nil {
				return err
			}
		}
	}
	return nil
}
