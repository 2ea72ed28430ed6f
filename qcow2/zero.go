package qcow2

// WriteZeroes implements Disk. Whole clusters become zero clusters: no data is
// written, and with unmap their host clusters are freed.
func (im *Image) WriteZeroes(off, n int64, unmap bool) error {
	return im.changeInSteps(off, n, func(off, n int64) error { return im.writeZeroes(off, n, unmap) })
}

// Discard implements Disk. Parts of clusters stay as they are.
func (im *Image) Discard(off, n int64) error {
	return im.changeInSteps(off, n, im.discard)
}

// changeInSteps makes one request of several where the range is large, so that
// what waits for requests under way does not wait for all of it. The steps end
// at borders of L2 tables.
func (im *Image) changeInSteps(off, n int64, step func(off, n int64) error) error {
	if err := im.checkRange(off, n); err != nil {
		return err
	}
	span := int64(1) << (im.geo.clusterBits + im.geo.l2Bits)
	for first := true; first || n > 0; first = false {
		k := min(n, span-off&(span-1))
		if _, err := im.change(off, k, func() (int, error) { return 0, step(off, k) }); err != nil {
			return err
		}
		off += k
		n -= k
	}
	return nil
}

// wholeClusters returns the clusters that lie in [off, off+n) whole. The last
// cluster of the disk counts as whole when the range reaches the end of the disk.
func (im *Image) wholeClusters(off, n int64) (first, end guestCluster) {
	g := &im.geo
	first = g.guestCluster(GuestOffset(off + g.clusterSize - 1))
	stop := off + n
	if stop == im.size.Load() {
		stop = g.roundUp(stop)
	}
	return first, max(first, g.guestCluster(GuestOffset(stop)))
}

func (im *Image) writeZeroes(off, n int64, unmap bool) error {
	g := &im.geo
	first, end := im.wholeClusters(off, n)
	start, stop := int64(g.guestOffset(first)), int64(g.guestOffset(end))
	if first == end { // inside one cluster, or across one border
		start = min(start, off+n)
		stop = start
	}
	if err := im.zeroPart(off, min(start, off+n)-off); err != nil {
		return err
	}
	for c := first; c < end; {
		k, err := im.remap(c, int64(end-c), func(e l2Entry) (l2Entry, bool) { return im.zeroed(e, unmap) })
		if err != nil {
			return err
		}
		if k == 0 { // version 2 cannot say zero over a backing file
			k = 1
			at := int64(g.guestOffset(c))
			end := max(im.size.Load(), off+n) // Resize zeroes beyond the size before it changes
			if err := im.writeZeroData(at, min(g.clusterSize, end-at)); err != nil {
				return err
			}
		}
		c += guestCluster(k)
	}
	if stop < off+n {
		return im.zeroPart(stop, off+n-stop)
	}
	return nil
}

func (im *Image) discard(off, n int64) error {
	for c, end := im.wholeClusters(off, n); c < end; {
		k, err := im.remap(c, int64(end-c), im.discarded)
		if err != nil {
			return err
		}
		c += guestCluster(max(k, 1))
	}
	return nil
}

// zeroed returns the entry that makes the cluster of e read as zeroes; ok is
// false if there is none.
func (im *Image) zeroed(e l2Entry, unmap bool) (now l2Entry, ok bool) {
	kind := e.kind()
	switch {
	case kind == kindUnallocated && im.base() == nil:
		return e, true
	case im.version < 3:
		return 0, im.base() == nil
	case !unmap && (kind == kindNormal || kind == kindZeroAllocated) && e.copied():
		return makeL2(e.offset(), true, true), true
	}
	return makeL2(0, false, true), true
}

// discarded returns what is left of e after a discard: nothing if that reads as
// zeroes, else a zero cluster, also where the backing file showed through; in
// version 2, which has none, e stays.
func (im *Image) discarded(e l2Entry) (now l2Entry, ok bool) {
	switch {
	case im.base() == nil:
		return 0, true
	case im.version < 3:
		return e, true
	}
	return makeL2(0, false, true), true
}

// remap replaces the entries of up to n clusters from c, within one L2 slice, and
// releases what they referred to. It returns how many it has dealt with: 0 when
// become has no entry for the first.
func (im *Image) remap(c guestCluster, n int64, become func(l2Entry) (l2Entry, bool)) (int64, error) {
	g := &im.geo
	tableOff, _, err := im.l2Table(im.l1.Load(), g.l1Index(c))
	if err != nil {
		return 0, err
	}
	if tableOff == 0 {
		if now, ok := become(0); ok && now == 0 {
			return min(n, int64(g.l2Entries-g.l2Index(c))), nil
		}
	}
	_, index := g.slice(g.l2Index(c))
	n = min(n, int64(g.sliceBytes/entryBytes-index))
	held := im.claims.acquire(im.claimKey(c), uint64(c), uint64(n))
	defer im.claims.release(held)

	var oldBuf, nowBuf [maxRunClusters]l2Entry
	old, now := oldBuf[:n], nowBuf[:n]
	tableOff, l1e, err := im.l2Table(im.l1.Load(), g.l1Index(c))
	if err != nil {
		return 0, err
	}
	if tableOff != 0 {
		if err := im.loadL2(g.l2Run(tableOff, c), old); err != nil {
			return 0, err
		}
	}
	if !l1e.copied() { // a snapshot shares the table, and so its clusters
		for i, e := range old {
			if !e.compressed() {
				old[i] = makeL2(e.offset(), false, e.zero())
			}
		}
	}
	changes := false
	for i, e := range old {
		entry, ok := become(e)
		if !ok {
			n = int64(i)
			break
		}
		now[i] = entry
		changes = changes || entry != e
	}
	if !changes {
		return n, nil
	}
	table, err := im.ensureL2(g.l1Index(c))
	if err != nil {
		return 0, err
	}
	if err := im.storeUnordered(g.l2Run(table, c), now[:n]); err != nil {
		return 0, err
	}
	for i, e := range old[:n] {
		if e != now[i] && (e.compressed() || e.offset() != now[i].offset()) {
			im.releaseCluster(e)
		}
	}
	return n, nil
}

// zeroPart zeroes [off, off+n), which lies in one or two clusters but fills
// none: nothing where zeroes are read already, else data is written.
func (im *Image) zeroPart(off, n int64) error {
	for n > 0 {
		m, err := im.lookup(im.l1.Load(), off, min(n, im.geo.clusterSize-im.geo.inCluster(off)))
		if err != nil {
			return err
		}
		if !im.readsZero(m.entry, off, m.n) {
			if err := im.writeZeroData(off, m.n); err != nil {
				return err
			}
		}
		off += m.n
		n -= m.n
	}
	return nil
}

func (im *Image) writeZeroData(off, n int64) error {
	buf := GetBuffer(int(n))
	defer PutBuffer(buf)
	clear(buf)
	_, err := im.write(buf, off)
	return err
}
