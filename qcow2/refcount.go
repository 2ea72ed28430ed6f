package qcow2

// Refcounts live in refcount blocks, in the cache. Only the functions of this
// file, and takeFree, change them, under the lock of their slice (allocator.refcountLock).

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
	block, err := g.refblockAt(a.table(), table)
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
	perWord := int64(64 / g.refcountBits)
	for run = 1; run < n; run++ {
		next, shift := g.refcountWord(index + int(run))
		for next != word && n-run >= perWord && t.Load(next) == count*g.refcountOnes { // a word of the same
			run += perWord
			next++
		}
		if run == n {
			break
		}
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
	return im.addRefcountsIn(im.allocator.table(), first, n, delta)
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
	off, word, _, perSlice := g.refcountSlice(block, index)
	t, err := im.handle.Get(classRefblock, int64(off))
	if err != nil {
		return 0, err
	}
	defer t.Unpin()
	index %= perSlice
	n = min(n, int64(perSlice-index))
	perWord := int64(64 / g.refcountBits)
	var buf [maxSliceBytes / entryBytes]uint64 // a slice is stored once for all its refcounts
	last, _ := g.refcountWord(index + int(n) - 1)
	words := buf[:last-word+1]
	t.Touch() // not under the lock: it may wait
	lock := a.refcountLock(g, off)
	lock.Lock()
	defer lock.Unlock()
	t.Words(words, word)
	done := int64(0)
	for done < n && err == nil {
		at, shift := g.refcountWord(index + int(done))
		w := &words[at-word]
		count := g.getRefcount(*w, shift)
		switch {
		case delta < 0 && count == 0:
			err = corruptf("refcount of cluster", g.hostOffset(c+hostCluster(done)), "it is 0 but the cluster is referenced")
		case delta > 0 && count == g.refcountMax:
			err = ErrRefcountOverflow
		case n-done >= perWord && (int64(index)+done)&(perWord-1) == 0 && *w == count*g.refcountOnes: // words of the same
			before, after := *w, (count+uint64(delta))*g.refcountOnes
			for rest := words[at-word:]; n-done >= perWord && rest[0] == before; rest = rest[1:] {
				rest[0] = after
				done += perWord
			}
		default:
			*w = g.setRefcount(*w, shift, count+uint64(delta))
			done++
		}
	}
	if done > 0 {
		t.SetWords(word, words)
	}
	return done, err
}
