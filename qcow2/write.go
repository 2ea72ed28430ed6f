package qcow2

import "fmt"

// maxRunClusters bounds how many clusters one request allocates in one step.
const maxRunClusters = maxSliceBytes / entryBytes

// WriteAt implements Disk.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	n, err := im.change(off, int64(len(p)), func() (int, error) { return im.write(p, off) })
	return n, err
}

// change runs one request that changes guest bytes [off, off+n): it admits it,
// and counts it in for as long as it may know host clusters.
func (im *Image) change(off, n int64, request func() (int, error)) (int, error) {
	im.gate.RLock()
	defer im.gate.RUnlock()
	if err := im.checkRange(off, n); err != nil {
		return 0, err
	}
	if err := im.writable(); err != nil {
		return 0, err
	}
	slot := im.epochs.enter()
	done, err := request()
	im.epochs.exit(slot)
	im.reclaimIfMany()
	return done, err
}

// write writes p at off: runs that may be overwritten in place go straight to
// the file, the rest allocates.
func (im *Image) write(p []byte, off int64) (int, error) {
	l1 := im.l1.Load() // stays the active one while the gate is open to us
	for done := 0; done < len(p); {
		rest := p[done:]
		at := off + int64(done)
		m, err := im.lookup(l1, at, int64(len(rest)))
		if err != nil {
			return done, err
		}
		n := int(m.n)
		if m.inPlace {
			if err = im.checkUnguarded("data cluster", m.host, m.n); err == nil {
				_, err = im.f.WriteAt(rest[:n], int64(m.host))
			}
		} else {
			n, err = im.writeNew(rest, at)
		}
		if err != nil {
			return done, fmt.Errorf("qcow2: write %d bytes at %#x: %w", len(rest), at, err)
		}
		done += n
	}
	return len(p), nil
}

// writeNew writes a part of p at off, from its start, to clusters that must be
// allocated or copied first, and returns its length. 0 means that another
// request has allocated them meanwhile.
//
// Order: refcounts rise, then the data and what is copied around it go to the
// file, then the entry is stored (E1, E2). A failure before the last step frees
// the clusters; nothing refers to them.
func (im *Image) writeNew(p []byte, off int64) (int, error) {
	g := &im.geo
	c := g.guestCluster(GuestOffset(off))
	count := g.clusters(g.inCluster(off) + int64(len(p)))
	_, index := g.slice(g.l2Index(c))
	count = min(count, int64(g.sliceBytes/entryBytes-index))

	held := im.claims.acquire(im.claimKey(c), uint64(c), uint64(count))
	defer im.claims.release(held)
	table, err := im.ensureL2(g.l1Index(c))
	if err != nil {
		return 0, err
	}
	r := g.l2Run(table, c)
	var buf [maxRunClusters]l2Entry
	old := buf[:count]
	if err := im.loadL2(r, old); err != nil {
		return 0, err
	}
	old = old[:needsNew(old)]
	if len(old) == 0 {
		return 0, nil
	}
	if e := old[0]; e.kind() == kindZeroAllocated && e.copied() {
		return im.writeOverZeroes(p, off, r, e)
	}
	first, n, fresh, err := im.allocData(int64(len(old)))
	if err != nil {
		return 0, err
	}
	old = old[:n]
	length := min(int64(len(p)), n*g.clusterSize-g.inCluster(off))
	if err := im.writeAround(p[:length], off, g.hostOffset(first), old[0], old[n-1], fresh); err != nil {
		im.free(first, n)
		return 0, err
	}
	var entries [maxRunClusters]l2Entry
	for i := range old {
		entries[i] = makeL2(g.hostOffset(first+hostCluster(i)), true, false)
	}
	if fresh && im.readZero(old, c) {
		err = im.storeUnordered(r, entries[:n])
	} else {
		err = im.storeL2(r, entries[:n])
	}
	if err != nil {
		im.free(first, n)
		return 0, err
	}
	for _, e := range old {
		im.releaseCluster(e)
	}
	return int(length), nil
}

// claimKey returns the shard key of claims on guest cluster c.
func (im *Image) claimKey(c guestCluster) uint64 {
	return uint64(c) / uint64(im.geo.sliceBytes/entryBytes)
}

// needsNew returns how many entries from the start cannot be written in place.
// A preallocated zero cluster, which can once its rest is zeroed, stands alone.
func needsNew(entries []l2Entry) int {
	for i, e := range entries {
		mine := e.copied()
		if e.kind() == kindNormal && mine {
			return i
		}
		if e.kind() == kindZeroAllocated && mine {
			return max(i, 1)
		}
	}
	return len(entries)
}

// writeOverZeroes writes into the host cluster that a zero cluster kept: the
// rest of it is zeroed with the same write, then the entry loses its zero flag.
func (im *Image) writeOverZeroes(p []byte, off int64, r l2Run, e l2Entry) (int, error) {
	if err := im.checkUnguarded("data cluster", e.offset(), im.geo.clusterSize); err != nil {
		return 0, err
	}
	length := min(int64(len(p)), im.geo.clusterSize-im.geo.inCluster(off))
	if err := im.writeAround(p[:length], off, e.offset(), e, e, false); err != nil {
		return 0, err
	}
	return int(length), im.storeL2(r, []l2Entry{makeL2(e.offset(), true, false)})
}

// writeAround writes p, which belongs at guest offset off, to the run of host
// clusters at host, together with the old content of the rest of the first and
// last cluster, whose entries are first and last: one vectored write. On fresh
// clusters the rest is not written where it is zero.
func (im *Image) writeAround(p []byte, off int64, host HostOffset, first, last l2Entry, fresh bool) error {
	g := &im.geo
	head := g.inCluster(off)
	tail := g.roundUp(head+int64(len(p))) - head - int64(len(p))
	if head == 0 && tail == 0 {
		_, err := im.f.WriteAt(p, int64(host))
		return err
	}
	headZero := head == 0 || im.readsZero(first, off-head, head)
	tailZero := tail == 0 || im.readsZero(last, off+int64(len(p)), tail)
	if fresh && headZero && tailZero {
		_, err := im.f.WriteAt(p, int64(host)+head)
		return err
	}
	buf := GetBuffer(int(head + tail))
	defer PutBuffer(buf)
	if err := im.readOld(buf[:head], off-head, first, headZero); err != nil {
		return err
	}
	if err := im.readOld(buf[head:head+tail], off+int64(len(p)), last, tailZero); err != nil {
		return err
	}
	bufs := [3][]byte{buf[:head], p, buf[head : head+tail]}
	_, err := im.f.WritevAt(bufs[:], int64(host))
	return err
}

// readZero reports whether the clusters from c on, whose entries are given, are
// known to be zero without reading.
func (im *Image) readZero(entries []l2Entry, c guestCluster) bool {
	for i, e := range entries {
		off := int64(im.geo.guestOffset(c + guestCluster(i)))
		if !im.readsZero(e, off, im.geo.clusterSize) {
			return false
		}
	}
	return true
}

// readsZero reports whether [off, off+n), inside the cluster of entry e, is known
// to be zero without reading.
func (im *Image) readsZero(e l2Entry, off, n int64) bool {
	switch e.kind() {
	case kindZero, kindZeroAllocated:
		return true
	case kindUnallocated:
		b := im.base()
		return b == nil || off >= b.Size()
	}
	return false
}

// readOld fills p with the content of guest offset off, inside the cluster of
// entry e. What lies beyond the end of the disk is zero.
func (im *Image) readOld(p []byte, off int64, e l2Entry, zero bool) error {
	if len(p) == 0 {
		return nil
	}
	if zero {
		clear(p)
		return nil
	}
	within := im.geo.inCluster(off)
	switch e.kind() {
	case kindNormal:
		return readHost(im.f, p, e.offset()+HostOffset(within))
	case kindCompressed:
		return im.readCompressed(e, p, within)
	default:
		return im.readBacking(p, off)
	}
}
