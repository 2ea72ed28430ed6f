package convert

import (
	"context"
	"iter"

	"csi-qcow2/qcow2"
)

// Extents returns the block status of [off, end) of d, extent by extent.
// Neighbours differ in state, or do not follow each other in the host file.
func Extents(ctx context.Context, d qcow2.Disk, off, end int64) iter.Seq2[qcow2.Extent, error] {
	return extents(ctx, d.BlockStatus, off, end)
}

// A statusFunc is the BlockStatus of a disk, or a closer look.
type statusFunc func(ctx context.Context, off, n int64) (qcow2.Extent, error)

// sparseStatus returns the block status of d in which holes of host files are
// zero, where d can look for them.
func sparseStatus(d qcow2.Disk) statusFunc {
	if s, ok := d.(interface {
		SparseStatus(ctx context.Context, off, n int64) (qcow2.Extent, error)
	}); ok {
		return s.SparseStatus
	}
	return d.BlockStatus
}

func extents(ctx context.Context, status statusFunc, off, end int64) iter.Seq2[qcow2.Extent, error] {
	return func(yield func(qcow2.Extent, error) bool) {
		for off < end {
			e, err := status(ctx, off, end-off)
			if err == nil {
				err = ctx.Err()
			}
			if !yield(e, err) || err != nil {
				return
			}
			off = e.End()
		}
	}
}

// A kind says what Copy does with a segment.
type kind uint8

const (
	keep kind = iota // nothing: the target's backing file has it
	zero             // make it zero, unless it is already
	data             // copy it
)

// A segment is a range of the source of one kind.
type segment struct {
	off, end int64
	kind     kind
}

// segments returns the segments of [0, end) of src in ascending order.
//
// All begin and end at multiples of granule, but for the end of the disk: a
// granule of which parts differ in kind is data. So the target never reads the
// rest of a granule that it is given in part, and writes none twice.
func segments(ctx context.Context, src qcow2.Disk, end, granule int64, targetHasBacking bool) iter.Seq2[segment, error] {
	return func(yield func(segment, error) bool) {
		var last segment // not yielded yet; it may grow
		for e, err := range extents(ctx, sparseStatus(src), 0, end) {
			if err != nil {
				yield(segment{}, err)
				return
			}
			s := segment{max(e.Off, last.end), e.End(), kindOf(e, targetHasBacking)}
			if s.off >= s.end {
				continue // inside a mixed granule, which is data already
			}
			if s.kind == last.kind {
				last.end = s.end
				continue
			}
			if s.kind == data {
				s.off -= s.off % granule
				last.end = s.off
			} else if s.off%granule != 0 {
				first := s.off - s.off%granule
				s.off = min(first+granule, end)
				if last.kind != data {
					last.end = first
					if last.off < last.end && !yield(last, nil) {
						return
					}
					last = segment{off: first, kind: data}
				}
				last.end = s.off
				if s.off >= s.end {
					continue
				}
			}
			if last.off < last.end && !yield(last, nil) {
				return
			}
			last = s
		}
		if last.off < last.end {
			yield(last, nil)
		}
	}
}

// kindOf returns what to do with an extent of the source. What the source
// itself leaves to its backing file, a target with a backing file leaves to its own.
func kindOf(e qcow2.Extent, targetHasBacking bool) kind {
	switch {
	case targetHasBacking && e.Depth > 0:
		return keep
	case e.Zero || !e.Data:
		return zero
	}
	return data
}

// Allocated returns how many bytes of d lie in granules that hold data.
func Allocated(ctx context.Context, d qcow2.Disk, granule int64) (int64, error) {
	total := int64(0)
	for s, err := range segments(ctx, d, d.Size(), granule, false) {
		if err != nil {
			return 0, err
		}
		if s.kind == data {
			total += (s.end - s.off + granule - 1) / granule * granule
		}
	}
	return total, nil
}
