package qcow2

// maxMaking is how many L2 tables of an image are made, copied or swept at a time.
// After a snapshot every write may need a copy. Each is some hundred steps in the
// cache, which are fast while few take them: all writers of a deep queue at
// once would hold each other up at every step, and all would end late.
const maxMaking = 2

// ensureL2 returns the L2 table that L1 entry index names and that belongs to
// the active state alone: it makes one, or copies one that a snapshot shares.
//
// The new table's entries are in the cache before the L1 entry that names it is
// stored, and reach the file before it. The old table leaves through the
// quarantine.
func (im *Image) ensureL2(index int) (HostOffset, error) {
	l1 := im.l1.Load()
	off, e, err := im.l2Table(l1, index)
	if err != nil || (off != 0 && e.copied()) {
		return off, err
	}
	im.making <- struct{}{}
	defer func() { <-im.making }()
	held := im.l1Claims.acquire(uint64(index), uint64(index), 1)
	defer im.l1Claims.release(held)
	off, e, err = im.l2Table(l1, index)
	if err != nil || (off != 0 && e.copied()) {
		return off, err
	}
	if c := im.cut.Load(); c != nil && off != 0 {
		_ = im.sweepTable(c, index) // an error is the snapshot's
	}
	first, err := im.allocTable(1)
	if err != nil {
		return 0, err
	}
	table := im.geo.hostOffset(first)
	if off == 0 {
		err = im.createTable(classL2, table, 1, nil)
	} else {
		err = im.copyL2(table, off)
	}
	if err == nil {
		err = im.storeL1(index, makeL1(table, true))
	}
	if err != nil {
		im.dropTable(first)
		im.free(first, 1)
		return 0, err
	}
	if off != 0 {
		im.release(im.geo.hostCluster(off), 1, true)
	}
	return table, nil
}

// copyL2 copies the L2 table at from, which is shared, to a new one at to. The
// clusters of a shared table are shared too, so no entry is COPIED.
func (im *Image) copyL2(to, from HostOffset) error {
	words := make([]uint64, im.geo.sliceBytes/entryBytes)
	for at := int64(0); at < im.geo.clusterSize; at += int64(im.geo.sliceBytes) {
		t, err := im.handle.Get(classL2, int64(from)+at)
		if err != nil {
			return err
		}
		t.Words(words, 0)
		t.Unpin()
		for i := range words {
			words[i] &^= entryCopied
		}
		if t, err = im.handle.Create(classL2, int64(to)+at); err != nil {
			return err
		}
		t.SetWords(0, words)
		t.Unpin()
	}
	return nil
}

// dropTable forgets what the cache holds of a table that never came into use.
func (im *Image) dropTable(c hostCluster) {
	off := int64(im.geo.hostOffset(c))
	for at := int64(0); at < im.geo.clusterSize; at += int64(im.geo.sliceBytes) {
		im.handle.Drop(off + at)
	}
}

// l2Run is a run of L2 entries inside one slice of a table that may be changed.
type l2Run struct {
	table HostOffset
	slice int64 // offset of the slice in the table
	index int   // of the first entry in the slice
}

func (g *geometry) l2Run(table HostOffset, c guestCluster) l2Run {
	slice, index := g.slice(g.l2Index(c))
	return l2Run{table, slice, index}
}

// loadL2 reads len(entries) entries of r.
func (im *Image) loadL2(r l2Run, entries []l2Entry) error {
	t, err := im.handle.Get(classL2, int64(r.table)+r.slice)
	if err != nil {
		return err
	}
	defer t.Unpin()
	for i := range entries {
		entries[i] = l2Entry(t.Load(r.index + i))
		if err := im.checkL2(entries[i], r.table, int(r.slice)/entryBytes+r.index+i); err != nil {
			return err
		}
	}
	return nil
}

// storeL2 stores entries at r: the moment at which readers see the change. What
// was written to the clusters that they name is durable before them (E1).
func (im *Image) storeL2(r l2Run, entries []l2Entry) error {
	im.handle.Order()
	return im.storeUnordered(r, entries)
}

// storeUnordered is storeL2 without E1: for entries that show no data, and for
// clusters that show what the guest saw there before when the data written to them is
// lost: zeroes.
func (im *Image) storeUnordered(r l2Run, entries []l2Entry) error {
	t, err := im.handle.Get(classL2, int64(r.table)+r.slice)
	if err != nil {
		return err
	}
	for i, e := range entries {
		t.Store(r.index+i, uint64(e))
	}
	t.Unpin()
	return nil
}

// releaseCluster gives up what e referred to: the caller has replaced e.
func (im *Image) releaseCluster(e l2Entry) {
	g := &im.geo
	switch e.kind() {
	case kindNormal, kindZeroAllocated:
		im.release(g.hostCluster(e.offset()), 1, false)
	case kindCompressed:
		off, n := e.compressedRange(g)
		first := g.hostCluster(off)
		last := g.hostCluster(off + HostOffset(n-1))
		im.release(first, int64(last-first)+1, false)
	}
}
