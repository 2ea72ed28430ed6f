package qcow2

import "fmt"

// A mapping is a run of guest bytes of one kind, inside one L2 slice.
type mapping struct {
	kind clusterKind
	// inPlace: the run is normal and neither its L2 table nor its clusters are
	// shared (COPIED at both levels), so a write may go straight to host.
	inPlace bool
	n       int64      // bytes
	host    HostOffset // of the first byte, for kindNormal and kindZeroAllocated
	entry   l2Entry    // of the first cluster
}

// l2Table returns the checked host offset of the L2 table of the L1 entry at index,
// 0 for none, and the entry.
func (im *Image) l2Table(l1 *l1Table, index int) (HostOffset, l1Entry, error) {
	if index >= len(l1.entries) { // the disk has become shorter since the range was checked
		return 0, 0, fmt.Errorf("%w: L1 entry %d of %d", ErrOutOfRange, index, len(l1.entries))
	}
	e := l1.load(index)
	if e == 0 {
		return 0, e, nil
	}
	entryOff := l1.off + HostOffset(index*entryBytes)
	if e.reserved() != 0 {
		return 0, e, corruptf("L1 entry", entryOff, "reserved bits %#x are set", e.reserved())
	}
	off := e.offset()
	if !im.geo.aligned(off) {
		return 0, e, corruptf("L1 entry", entryOff, "L2 table offset %#x is not aligned to a cluster", uint64(off))
	}
	if off == 0 {
		return 0, e, nil
	}
	return off, e, im.checkUnguarded("L2 table", off, im.geo.clusterSize)
}

// checkL2 validates entry e, which stands at index of the L2 table at off.
func (im *Image) checkL2(e l2Entry, off HostOffset, index int) error {
	if e.compressed() {
		if e.copied() {
			return corruptf("L2 entry", off+HostOffset(index*entryBytes), "a compressed cluster is marked COPIED")
		}
		return nil
	}
	if r := e.reserved(); r != 0 {
		return corruptf("L2 entry", off+HostOffset(index*entryBytes), "reserved bits %#x are set", r)
	}
	if !im.geo.aligned(e.offset()) {
		return corruptf("L2 entry", off+HostOffset(index*entryBytes), "host offset %#x is not aligned to a cluster", uint64(e.offset()))
	}
	if e.zero() && im.hdr.version < 3 {
		return corruptf("L2 entry", off+HostOffset(index*entryBytes), "the zero flag is set in a version 2 image")
	}
	if e.offset() == off {
		return corruptf("L2 entry", off+HostOffset(index*entryBytes), "it names the table that it is in")
	}
	if e.offset() == 0 && e.copied() {
		return corruptf("L2 entry", off+HostOffset(index*entryBytes), "COPIED is set without a host offset")
	}
	return nil
}

// lookup maps the run that starts at off and is at most n bytes long, n > 0. The
// run ends at the latest with its L2 slice, or with its L2 table if there is none.
func (im *Image) lookup(l1 *l1Table, off int64, n int64) (mapping, error) {
	g := &im.geo
	c := g.guestCluster(GuestOffset(off))
	within := g.inCluster(off)
	index := g.l2Index(c)
	tableOff, l1e, err := im.l2Table(l1, g.l1Index(c))
	if err != nil {
		return mapping{}, err
	}
	if tableOff == 0 {
		rest := int64(g.l2Entries-index)<<g.clusterBits - within
		return mapping{kind: kindUnallocated, n: min(n, rest)}, nil
	}
	sliceOff, i := g.slice(index)
	t, err := im.handle.Get(classL2, int64(tableOff)+sliceOff)
	if err != nil {
		return mapping{}, err
	}
	first := l2Entry(t.Load(i))
	if err := im.checkL2(first, tableOff, index); err != nil {
		t.Unpin()
		return mapping{}, err
	}
	m := mapping{
		kind:    first.kind(),
		inPlace: first.kind() == kindNormal && l1e.copied() && first.copied(),
		n:       g.clusterSize - within,
		entry:   first,
	}
	if m.kind == kindNormal || m.kind == kindZeroAllocated {
		m.host = first.offset() + HostOffset(within)
	}
	for k := 1; m.n < n && i+k < t.Len() && m.kind != kindCompressed; k++ {
		e := l2Entry(t.Load(i + k))
		if !continues(first, e, k, g.clusterSize) || im.checkL2(e, tableOff, index+k) != nil {
			break
		}
		m.n += g.clusterSize
	}
	t.Unpin()
	m.n = min(m.n, n)
	return m, nil
}

// continues reports whether e, k clusters after first, belongs to the same run.
func continues(first, e l2Entry, k int, clusterSize int64) bool {
	if e.kind() != first.kind() || e.copied() != first.copied() {
		return false
	}
	if first.offset() == 0 {
		return true
	}
	return e.offset() == first.offset()+HostOffset(int64(k)*clusterSize)
}
