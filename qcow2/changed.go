package qcow2

import (
	"context"
	"fmt"
	"math"
	"os"
)

// Changed calls visit with the ranges of target, from offset off on, that may
// differ from base, in ascending order; neighbouring ranges are one. A nil base
// is a disk of zeroes: then the ranges are those that hold data. Where base is
// shorter than target it counts as zeroes.
//
// It reads L1 and L2 tables of the images and of their backing chains, and no
// data: a range differs when it is stored in another place. So no difference is
// missed, and what was written with the bytes that were there is reported as well;
// a range ends where a cluster does. Where both share an L2 table, it is not
// looked at. The images may be states of one file or of different ones: a clone
// and what it was made from have the places of what the clone did not write
// in common.
//
// Both must not change meanwhile: internal snapshots, opened read-only
// (Options.Snapshot). Their volume may be in use, and written. An error of visit
// ends the walk and is returned.
func Changed(ctx context.Context, base, target Disk, off int64, visit func(off, n int64) error) error {
	if off < 0 || off > target.Size() {
		return fmt.Errorf("%w: offset %d of %d bytes", ErrOutOfRange, off, target.Size())
	}
	w := &changeWalk{visit: visit}
	var err error
	if w.target, err = w.levels(target); err != nil {
		return err
	}
	if base != nil {
		if w.base, err = w.levels(base); err != nil {
			return err
		}
	}
	for end := target.Size(); off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		if off, err = w.step(ctx, off, end); err != nil {
			return err
		}
	}
	return w.flush()
}

// A changeWalk compares two states.
type changeWalk struct {
	target, base []level // the first is the state itself, the last its base; no level is zeroes
	files        []File  // that levels are in
	off, n       int64   // the range that was not visited yet
	visit        func(off, n int64) error
}

// A level is an image of a backing chain, in one state.
type level struct {
	disk Disk
	im   *Image // nil if disk is no qcow2 image
	file int    // index in changeWalk.files; -1 if it cannot be told
}

// levels returns the chain of d.
func (w *changeWalk) levels(d Disk) ([]level, error) {
	var chain []level
	for d != nil {
		for {
			wrapper, ok := d.(interface{ Unwrap() Disk })
			if !ok {
				break
			}
			d = wrapper.Unwrap()
		}
		l := level{disk: d, file: -1}
		switch d := d.(type) {
		case *Image:
			if !d.opts.ReadOnly {
				return nil, fmt.Errorf("%w: an image that is open for writing has no state to compare", ErrUnsupported)
			}
			l.im, l.file = d, w.fileOf(d.f)
		case *Raw:
			l.file = w.fileOf(d.f)
		}
		chain = append(chain, l)
		d = nil
		if l.im != nil {
			d = l.im.base()
		}
	}
	return chain, nil
}

// fileOf returns the number of f: the same for all that are one file of the host.
func (w *changeWalk) fileOf(f File) int {
	type stater interface{ Stat() (os.FileInfo, error) }
	for i, known := range w.files {
		if known == f {
			return i
		}
		a, ok := known.(stater)
		b, also := f.(stater)
		if !ok || !also {
			continue
		}
		infoA, errA := a.Stat()
		infoB, errB := b.Stat()
		if errA == nil && errB == nil && os.SameFile(infoA, infoB) {
			return i
		}
	}
	w.files = append(w.files, f)
	return len(w.files) - 1
}

// step compares from off to the end of the shorter of two L2 tables, and returns
// where it ended.
func (w *changeWalk) step(ctx context.Context, off, end int64) (int64, error) {
	target, err := tableAt(w.target, off)
	if err != nil {
		return 0, err
	}
	base, err := tableAt(w.base, off)
	if err != nil {
		return 0, err
	}
	stop := min(end, target.end, base.end)
	if target.sameAs(base) {
		return stop, nil
	}
	for off < stop {
		a, err := placeAt(ctx, target.rest, off, stop-off)
		if err != nil {
			return 0, err
		}
		b, err := placeAt(ctx, base.rest, off, a.n)
		if err != nil {
			return 0, err
		}
		if !a.sameAs(b) {
			if err := w.add(off, b.n); err != nil {
				return 0, err
			}
		}
		off += b.n
	}
	return stop, nil
}

// add adds a range that differs.
func (w *changeWalk) add(off, n int64) error {
	if w.n > 0 && w.off+w.n == off {
		w.n += n
		return nil
	}
	if err := w.flush(); err != nil {
		return err
	}
	w.off, w.n = off, n
	return nil
}

func (w *changeWalk) flush() error {
	if w.n == 0 {
		return nil
	}
	n := w.n
	w.n = 0
	return w.visit(w.off, n)
}

// A tablePlace is the first of the L2 tables of a chain that map an offset.
type tablePlace struct {
	rest  []level    // of the chain, from the level of the table on; none: all zeroes
	table HostOffset // 0: rest[0] is no qcow2 image, or there is no rest
	end   int64      // of what the table maps, and of what the levels above leave to it
}

// tableAt passes over the levels that have no table for off.
func tableAt(chain []level, off int64) (tablePlace, error) {
	p := tablePlace{rest: chain, end: math.MaxInt64}
	for ; len(p.rest) > 0; p.rest = p.rest[1:] {
		l := p.rest[0]
		if off >= l.disk.Size() {
			p.rest = nil // what lies below does not show through
			break
		}
		p.end = min(p.end, l.disk.Size())
		if l.im == nil {
			break
		}
		g := &l.im.geo
		c := g.guestCluster(GuestOffset(off))
		span := int64(1) << (g.clusterBits + g.l2Bits)
		if end := off - off&(span-1) + span; end > 0 { // else beyond what an int64 holds
			p.end = min(p.end, end)
		}
		var err error
		if p.table, _, err = l.im.l2Table(l.im.l1.Load(), g.l1Index(c)); err != nil {
			return p, err
		}
		if p.table != 0 {
			break
		}
	}
	return p, nil
}

// sameAs reports whether both show the same bytes up to the nearer end.
func (p tablePlace) sameAs(q tablePlace) bool {
	if len(p.rest) == 0 || len(q.rest) == 0 {
		return len(p.rest) == len(q.rest)
	}
	if p.table == 0 || p.table != q.table {
		return false
	}
	return sameChain(p.rest, q.rest)
}

// sameChain reports whether what a table of the first level leaves to those
// below is the same in both chains.
func sameChain(a, b []level) bool {
	if len(a) != len(b) || a[0].file != b[0].file || a[0].file < 0 {
		return false
	}
	for i := 1; i < len(a); i++ {
		x, y := a[i], b[i]
		if x.disk == y.disk {
			return true
		}
		if x.file != y.file || x.file < 0 || x.disk.Size() != y.disk.Size() || (x.im == nil) != (y.im == nil) {
			return false
		}
		if x.im != nil && x.im.l1.Load().off != y.im.l1.Load().off {
			return false
		}
	}
	return true
}

// A place is where a run of guest bytes is stored.
type place struct {
	n     int64
	zero  bool
	file  int         // level.file; without zero
	kind  clusterKind // kindNormal or kindCompressed
	start uint64      // host offset of the first byte; of a compressed cluster its descriptor
}

// placeAt finds the place of the run that begins at off, cut to n bytes.
func placeAt(ctx context.Context, chain []level, off, n int64) (place, error) {
	for _, l := range chain {
		if off >= l.disk.Size() {
			break
		}
		n = min(n, l.disk.Size()-off)
		if l.im == nil {
			return l.place(ctx, off, n)
		}
		m, err := l.im.lookup(l.im.l1.Load(), off, n)
		if err != nil {
			return place{}, err
		}
		n = m.n
		switch m.kind {
		case kindNormal:
			return place{n: n, file: l.file, kind: kindNormal, start: uint64(m.host)}, nil
		case kindCompressed:
			return place{n: n, file: l.file, kind: kindCompressed, start: uint64(m.entry)}, nil
		case kindZero, kindZeroAllocated:
			return place{n: n, zero: true}, nil
		}
	}
	return place{n: n, zero: true}, nil
}

// place is placeAt for the base of a chain that is no qcow2 image.
func (l level) place(ctx context.Context, off, n int64) (place, error) {
	e, err := l.disk.BlockStatus(ctx, off, n)
	if err != nil {
		return place{}, err
	}
	return place{n: e.Len, zero: e.Zero, file: l.file, kind: kindNormal, start: uint64(off)}, nil
}

// sameAs reports whether p and q, which is no longer, show the same bytes.
func (p place) sameAs(q place) bool {
	if p.zero || q.zero {
		return p.zero == q.zero
	}
	return p.file == q.file && p.file >= 0 && p.kind == q.kind && p.start == q.start
}
