package qcow2

import (
	"context"
	"math"
)

// walkCompressed adds up the host clusters that hold compressed data of s. One
// can hold data of many guest clusters and has a reference from each, so it is
// unique if its refcount is the number of references of s alone. They are
// counted for a window of host clusters at a time, which bounds the memory: an
// image has as many windows as it has terabytes or so.
func (w *usageWalk) walkCompressed(ctx context.Context, s *usedState) error {
	if w.counters == nil {
		w.counters = make([]uint32, usageCounters)
	}
	for w.base = 0; ; {
		clear(w.counters)
		next, err := w.countWindow(ctx, s)
		if err != nil {
			return err
		}
		for i, n := range w.counters {
			if n == 0 {
				continue
			}
			count, err := w.im.refcount(w.base + hostCluster(i))
			if err != nil {
				return err
			}
			if count <= uint64(n) {
				s.unique++
			} else {
				s.shared++
			}
		}
		if next == math.MaxUint64 {
			return nil
		}
		w.base = next
	}
}

// countWindow counts the references of compressed clusters of s to the host
// clusters of the window, and returns the first one beyond it that has any.
func (w *usageWalk) countWindow(ctx context.Context, s *usedState) (next hostCluster, err error) {
	g := &w.im.geo
	next = math.MaxUint64
	const chunk = usageL1Bytes / entryBytes
	for first := 0; first < s.l1Size; first += chunk {
		row, err := w.readL1(s, first, min(first+chunk, s.l1Size))
		if err != nil {
			return 0, err
		}
		for index := first; index < min(first+chunk, s.l1Size); index++ {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			err := w.walkOne(s, row, index, index-first, func(e l2Entry) error {
				if !e.compressed() {
					return nil
				}
				off, n := e.compressedRange(g)
				for c := g.hostCluster(off); c <= g.hostCluster(off+HostOffset(n-1)); c++ {
					if c >= w.base && c < w.base+usageCounters {
						w.counters[c-w.base]++
					} else if c >= w.base {
						next = min(next, c)
					}
				}
				return nil
			})
			if err != nil {
				return 0, err
			}
		}
	}
	return next, nil
}

// walkOne visits the entries of the L2 table of one L1 index of s.
func (w *usageWalk) walkOne(s *usedState, row []uint64, index, column int, visit func(l2Entry) error) error {
	slot := w.im.epochs.enter()
	defer w.im.epochs.exit(slot)
	var off HostOffset
	if s.live {
		var err error
		if off, _, err = w.im.l2Table(w.im.l1.Load(), index); err != nil {
			return err
		}
	} else {
		off = l1Entry(row[column]).offset()
	}
	if off == 0 {
		return nil
	}
	return w.eachEntry(off, visit)
}
