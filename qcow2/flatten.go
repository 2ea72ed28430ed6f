package qcow2

import "context"

// Flattening copies up what an image still shows of its backing chain, while
// guests read and write it, and then lets go of the chain:
//
//	Populate      per run of clusters: claim it as a write does, look at the entries
//	              again, read the chain, write the data, store the entries (E1, E2).
//	              A guest's write to the same clusters comes before or after.
//	DropBacking   when nothing shows the chain any more, neither the active state
//	              nor a snapshot: take the name out of the header, then close it.
//
// Populating changes no byte that a guest can see, so it can stop and begin again
// anywhere, and a crash costs no more than the work since the last Flush.

// base returns the backing file, nil for none. Who loads it inside a request may
// use it until the request ends.
func (im *Image) base() Disk {
	if b := im.backing.Load(); b != nil {
		return *b
	}
	return nil
}

// populateBytes bounds what Populate copies in one step, whose clusters a guest's
// write may wait for.
const populateBytes int64 = 1 << 20

// Populate copies what [off, Size()) shows of the backing chain into clusters of
// the image itself, up to about limit bytes. It returns the offset up to which
// the active state does not need the chain any more, Size() at the end, and the
// bytes that were copied. The cost follows what is allocated in the chain. It is
// durable after the next Flush.
func (im *Image) Populate(ctx context.Context, off, limit int64) (next, copied int64, err error) {
	for off < im.size.Load() && copied < limit {
		ext, err := im.BlockStatus(ctx, off, im.size.Load()-off)
		if err != nil {
			return off, copied, err
		}
		if ext.Depth == 0 || ext.Zero { // our own, or nobody's
			off = ext.End()
			continue
		}
		n, c, err := im.populate(off, min(ext.Len, limit-copied))
		copied += c
		if err != nil {
			return off, copied, err
		}
		off += n
	}
	return min(off, im.size.Load()), copied, nil
}

// populate makes the clusters of [off, off+n) the image's own, in one step, from
// its start. It returns the length of what it has dealt with, and the bytes copied.
func (im *Image) populate(off, n int64) (length, copied int64, err error) {
	g := &im.geo
	c := g.guestCluster(GuestOffset(off))
	_, index := g.slice(g.l2Index(c))
	count := min(g.clusters(g.inCluster(off)+n), int64(g.sliceBytes/entryBytes-index), max(populateBytes>>g.clusterBits, 1))
	length = count<<g.clusterBits - g.inCluster(off)
	_, err = im.change(off, min(length, im.size.Load()-off), func() (int, error) {
		copied, err = im.populateRun(c, count)
		return 0, err
	})
	return length, copied, err
}

// populateRun copies up what of the n clusters from c, within one L2 slice, is
// unallocated.
func (im *Image) populateRun(c guestCluster, n int64) (copied int64, err error) {
	g := &im.geo
	held := im.claims.acquire(im.claimKey(c), uint64(c), uint64(n))
	defer im.claims.release(held)
	table, err := im.ensureL2(g.l1Index(c))
	if err != nil {
		return 0, err
	}
	var buf [maxRunClusters]l2Entry
	entries := buf[:n]
	if err := im.loadL2(g.l2Run(table, c), entries); err != nil {
		return 0, err
	}
	content := GetBuffer(int(n << g.clusterBits))
	defer PutBuffer(content)
	for i := int64(0); i < n; {
		if entries[i].kind() != kindUnallocated {
			i++
			continue
		}
		k := i + 1
		for k < n && entries[k].kind() == kindUnallocated {
			k++
		}
		at := c + guestCluster(i)
		run := content[:(k-i)<<g.clusterBits]
		if err := im.readBacking(run, int64(g.guestOffset(at))); err != nil {
			return copied, err
		}
		for len(run) > 0 {
			m, err := im.copyUp(g.l2Run(table, at), run)
			if err != nil {
				return copied, err
			}
			copied += m << g.clusterBits
			run = run[m<<g.clusterBits:]
			at += guestCluster(m)
		}
		i = k
	}
	return copied, nil
}

// copyUp stores the first clusters of content, all zero or none, at r, whose
// entries are unallocated. It returns how many.
func (im *Image) copyUp(r l2Run, content []byte) (int64, error) {
	g := &im.geo
	total := int64(len(content)) >> g.clusterBits
	zero := func(i int64) bool {
		return im.version >= 3 && IsZero(content[i<<g.clusterBits:(i+1)<<g.clusterBits])
	}
	n := int64(1)
	for first := zero(0); n < total && zero(n) == first; {
		n++
	}
	var buf [maxRunClusters]l2Entry
	if zero(0) {
		for i := range n {
			buf[i] = makeL2(0, false, true)
		}
		return n, im.storeL2(r, buf[:n])
	}
	first, n, _, err := im.allocData(n)
	if err != nil {
		return 0, err
	}
	if _, err := im.f.WriteAt(content[:n<<g.clusterBits], int64(g.hostOffset(first))); err != nil {
		im.free(first, n)
		return 0, err
	}
	for i := range n {
		buf[i] = makeL2(g.hostOffset(first+hostCluster(i)), true, false)
	}
	if err := im.storeL2(r, buf[:n]); err != nil {
		im.free(first, n)
		return 0, err
	}
	return n, nil
}

// DropBacking makes the image one without a backing file, durably and while it
// is used, and closes the backing file. It returns false, and changes nothing,
// when the active state or an internal snapshot still shows some of it: Populate
// sees to the former, deleting the snapshots to the latter.
func (im *Image) DropBacking(ctx context.Context) (bool, error) {
	im.structural.Lock()
	defer im.structural.Unlock()
	if err := im.writable(); err != nil {
		return false, err
	}
	if im.base() == nil {
		return true, nil
	}
	if needed, err := im.needsBacking(ctx); needed || err != nil {
		return false, err
	}
	// All that was populated is durable before the name goes.
	if err := im.handle.WriteBack(); err != nil {
		return false, err
	}
	// A request that looked at an entry before it was populated may go to the
	// backing file still: it must find it there.
	im.epochs.synchronize()
	if err := im.writeNoBacking(); err != nil {
		return false, err
	}
	old := im.backing.Swap(nil)
	im.epochs.synchronize()
	return true, (*old).Close()
}

// needsBacking reports whether the active state or a snapshot shows anything of
// the backing file but zeroes. Guests that write meanwhile cannot make it so.
//
// Preconditions: im.structural is held.
func (im *Image) needsBacking(ctx context.Context) (bool, error) {
	if needed, err := im.stateNeedsBacking(ctx, im.l1.Load, im.size.Load()); needed || err != nil {
		return needed, err
	}
	records := im.snapshots()
	for i := range records {
		entries, err := im.readSnapshotL1(&records[i])
		if err != nil {
			return false, err
		}
		size := int64(records[i].diskSize)
		l1 := newL1Table(records[i].l1Offset, entries)
		if im.geo.l1EntriesFor(size) > int64(len(entries)) {
			return false, corruptf("snapshot L1 table", l1.off, "%d entries do not cover %d bytes", len(entries), size)
		}
		needed, err := im.stateNeedsBacking(ctx, func() *l1Table { return l1 }, size)
		if needed || err != nil {
			return needed, err
		}
	}
	return false, nil
}

// stateNeedsBacking is needsBacking of the state with the table l1 and size bytes.
func (im *Image) stateNeedsBacking(ctx context.Context, l1 func() *l1Table, size int64) (bool, error) {
	step := func(off int64) (n int64, needed bool, err error) {
		slot := im.epochs.enter()
		defer im.epochs.exit(slot)
		m, err := im.lookup(l1(), off, size-off)
		if err != nil || m.kind != kindUnallocated {
			return m.n, false, err
		}
		ext, err := im.backingStatus(ctx, off, m.n)
		return ext.Len, !ext.Zero, err
	}
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, needed, err := step(off)
		if needed || err != nil {
			return needed, err
		}
		off += n
	}
	return false, nil
}
