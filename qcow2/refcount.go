package qcow2

// Refcounts live in refcount blocks, in the cache. Only the functions of this
// file, and takeFree, change them, under allocator.mu.

// refcountSlice locates the refcount at index of the block at block: the offset
// of its slice, its word and shift in the slice, and how many refcounts a slice holds.
func (g *geometry) refcountSlice(block HostOffset, index int) (off HostOffset, word int, shift uint, perSlice int) {
	perSlice = g.sliceBytes * 8 / int(g.refcountBits)
	off = block + HostOffset(index/perSlice*g.sliceBytes)
	word, shift = g.refcountWord(index % perSlice)
	return off, word, shift, perSlice
}

// refblockAt returns the offset of refcount block number table of reftable, 0 if
// there is none.
func (g *geometry) refblockAt(reftable []uint64, table int) (HostOffset, error) {
	if table >= len(reftable) {
		return 0, nil
	}
	off := HostOffset(reftable[table])
	if uint64(off)&refReservedMask != 0 || !g.aligned(off) || off >= maxHostOffset {
		return 0, corruptf("refcount table entry", HostOffset(table*entryBytes),
			"%#x is not the offset of a cluster", uint64(off))
	}
	return off, nil
}

// refcount returns the refcount of c.
func (im *Image) refcount(c hostCluster) (uint64, error) {
	count, _, err := im.refcountRun(c, 1)
	return count, err
}

// refcountRun returns the refcount of c and how many clusters from c on, of at
// most n, have the same. It looks no further than c's slice of refcounts.
func (im *Image) refcountRun(c hostCluster, n int64) (count uint64, run int64, err error) {
	g, a := &im.geo, &im.allocator
	table, index := g.refblockIndex(c)
	a.mu.Lock()
	block, err := g.refblockAt(a.reftable, table)
	a.mu.Unlock()
	if err != nil {
		return 0, 0, err
	}
	if block == 0 {
		return 0, min(n, int64(1<<g.refblockBits-index)), nil
	}
	off, word, shift, perSlice := g.refcountSlice(block, index)
	t, err := im.handle.Get(classRefblock, int64(off))
	if err != nil {
		return 0, 0, err
	}
	defer t.Unpin()
	w := t.Load(word)
	count = g.getRefcount(w, shift)
	index %= perSlice
	n = min(n, int64(perSlice-index))
	for run = 1; run < n; run++ {
		next, shift := g.refcountWord(index + int(run))
		if next != word {
			word, w = next, t.Load(next)
		}
		if g.getRefcount(w, shift) != count {
			break
		}
	}
	return count, run, nil
}

// addRefcounts adds delta (+1 or -1) to the refcounts of n clusters. On an error
// the clusters before the bad one are put back.
func (im *Image) addRefcounts(first hostCluster, n int64, delta int) error {
	im.allocator.mu.Lock()
	reftable := im.allocator.reftable
	im.allocator.mu.Unlock()
	return im.addRefcountsIn(reftable, first, n, delta)
}

// addRefcountsIn is addRefcounts with a refcount table that may not be in force yet.
func (im *Image) addRefcountsIn(reftable []uint64, first hostCluster, n int64, delta int) error {
	done := int64(0)
	for done < n {
		k, err := im.addInSlice(reftable, first+hostCluster(done), n-done, delta)
		done += k
		if err != nil {
			if done > 0 {
				// Cannot fail but for I/O, and then the rest is a leak.
				_ = im.addRefcountsIn(reftable, first, done, -delta)
			}
			return err
		}
	}
	return nil
}

// addInSlice adds delta to the refcounts of up to n clusters from c that share
// c's slice, and returns of how many.
func (im *Image) addInSlice(reftable []uint64, c hostCluster, n int64, delta int) (int64, error) {
	g, a := &im.geo, &im.allocator
	table, index := g.refblockIndex(c)
	block, err := g.refblockAt(reftable, table)
	if err != nil {
		return 0, err
	}
	if block == 0 {
		return 0, corruptf("refcount of cluster", g.hostOffset(c), "no refcount block covers it")
	}
	off, word, shift, perSlice := g.refcountSlice(block, index)
	t, err := im.handle.Get(classRefblock, int64(off))
	if err != nil {
		return 0, err
	}
	defer t.Unpin()
	n = min(n, int64(perSlice-index%perSlice))
	a.mu.Lock()
	defer a.mu.Unlock()
	w := t.Load(word)
	for i := int64(0); i < n; i++ {
		count := g.getRefcount(w, shift)
		switch {
		case delta < 0 && count == 0:
			t.Store(word, w)
			return i, corruptf("refcount of cluster", g.hostOffset(c+hostCluster(i)), "it is 0 but the cluster is referenced")
		case delta > 0 && count == g.refcountMax:
			t.Store(word, w)
			return i, ErrRefcountOverflow
		}
		w = g.setRefcount(w, shift, count+uint64(delta))
		next, nextShift := g.refcountWord(index%perSlice + int(i) + 1)
		if next != word || i+1 == n { // a word is stored once for all its refcounts
			t.Store(word, w)
			if i+1 < n {
				w = t.Load(next)
			}
		}
		word, shift = next, nextShift
	}
	return n, nil
}
