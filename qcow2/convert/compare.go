package convert

import (
	"bytes"
	"context"
	"fmt"
	"sync"

	"csi-qcow2/qcow2"
)

// CompareOptions say how Compare compares.
type CompareOptions struct {
	// Workers compare chunks at the same time; 0 means DefaultWorkers.
	Workers int
	// Strict also demands the same size and the same block status.
	Strict bool
	// Progress is as for Copy, of the larger of the two sizes.
	Progress func(done int64)
}

// A Difference says how two disks differ.
type Difference struct {
	Kind DifferenceKind
	// Off is the first offset that differs, as a multiple of 512.
	Off int64
}

// A DifferenceKind is a way to differ.
type DifferenceKind int

// The values of DifferenceKind.
const (
	Equal         DifferenceKind = iota
	ContentDiffer                // the bytes at Off
	SizeDiffer                   // strict only
	StatusDiffer                 // strict only: the block status at Off
)

// compareUnit is the precision of Difference.Off.
const compareUnit = 512

// Compare compares a and b. Where one is longer, the rest of it must be zero.
func Compare(ctx context.Context, a, b qcow2.Disk, o CompareOptions) (Difference, error) {
	if o.Strict && a.Size() != b.Size() {
		return Difference{Kind: SizeDiffer}, nil
	}
	if o.Workers <= 0 {
		o.Workers = DefaultWorkers
	}
	c := comparer{disks: [2]qcow2.Disk{a, b}, opts: o}
	c.progress.report = o.Progress
	err := parallel(ctx, o.Workers, c.produce, c.do)
	if err != nil {
		return Difference{}, err
	}
	return c.first, nil
}

// A comparer is one Compare.
type comparer struct {
	disks    [2]qcow2.Disk
	opts     CompareOptions
	progress progress

	mu    sync.Mutex
	first Difference // that with the lowest offset; guarded by mu
}

// A pair is a range of both disks. What need not be read is zero.
type pair struct {
	off, end int64
	read     [2]bool
}

// produce emits the ranges that must be read, until a difference is found.
func (c *comparer) produce(ctx context.Context, emit func(pair) error) error {
	var at [2]qcow2.Extent
	status := [2]statusFunc{sparseStatus(c.disks[0]), sparseStatus(c.disks[1])}
	if c.opts.Strict {
		status = [2]statusFunc{c.disks[0].BlockStatus, c.disks[1].BlockStatus}
	}
	end := max(c.disks[0].Size(), c.disks[1].Size())
	for off := int64(0); off < end && !c.found(); {
		p := pair{end: end}
		for i, d := range c.disks {
			if off >= d.Size() {
				continue // reads as zeroes
			}
			if off >= at[i].End() {
				var err error
				if at[i], err = status[i](ctx, off, d.Size()-off); err != nil {
					return err
				}
			}
			p.end = min(p.end, at[i].End())
			p.read[i] = at[i].Data && !at[i].Zero
		}
		if c.opts.Strict && !sameStatus(at[0], at[1]) {
			c.report(Difference{StatusDiffer, off})
			return nil
		}
		for off < p.end {
			next := p.end
			if p.read[0] || p.read[1] {
				next = min(p.end, (off/chunkBytes+1)*chunkBytes)
				if err := emit(pair{off, next, p.read}); err != nil {
					return err
				}
			} else {
				c.progress.add(next - off)
			}
			off = next
		}
	}
	return nil
}

// sameStatus reports whether both extents are stored alike.
func sameStatus(a, b qcow2.Extent) bool {
	return a.Allocated == b.Allocated && a.Data == b.Data && a.Zero == b.Zero && (a.HostOff < 0) == (b.HostOff < 0)
}

// do compares one range.
func (c *comparer) do(_ context.Context, p pair) error {
	var bufs [2][]byte
	for i, d := range c.disks {
		if !p.read[i] {
			continue
		}
		bufs[i] = qcow2.GetBuffer(int(p.end - p.off))
		defer qcow2.PutBuffer(bufs[i])
		if _, err := d.ReadAt(bufs[i], p.off); err != nil {
			return fmt.Errorf("read %d bytes at %#x of disk %d: %w", p.end-p.off, p.off, i+1, err)
		}
	}
	if off := differ(bufs[0], bufs[1], p.off); off >= 0 {
		c.report(Difference{ContentDiffer, off})
	}
	c.progress.add(p.end - p.off)
	return nil
}

// differ returns the first offset at which a and b, which lie at off, differ,
// rounded down to compareUnit, or -1. Nil stands for zeroes.
func differ(a, b []byte, off int64) int64 {
	if a == nil {
		a, b = b, nil
	}
	if b == nil && qcow2.IsZero(a) || b != nil && bytes.Equal(a, b) {
		return -1
	}
	for at := 0; ; {
		unit := (off + int64(at)) &^ (compareUnit - 1)
		end := min(int(unit+compareUnit-off), len(a))
		if b == nil && !qcow2.IsZero(a[at:end]) || b != nil && !bytes.Equal(a[at:end], b[at:end]) {
			return unit
		}
		at = end
	}
}

// report keeps d if it comes before what was found so far.
func (c *comparer) report(d Difference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.first.Kind == Equal || d.Off < c.first.Off {
		c.first = d
	}
}

func (c *comparer) found() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first.Kind != Equal
}
