package qcow2

import "context"

// fixCopied sets COPIED where the refcount is 1, in the active L1 table and all
// its L2 tables, and clears it elsewhere. Writers go on: each step claims what
// it looks at.
//
// Preconditions: im.structural is held: no refcount of a cluster in use rises.
func (im *Image) fixCopied(ctx context.Context) error {
	g := &im.geo
	l1 := im.l1.Load()
	perSlice := g.sliceBytes / entryBytes
	for i := range l1.entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		switch table, _, err := im.l2Table(l1, i); {
		case err != nil:
			return err
		case table == 0:
			continue
		}
		// The table first: a write copies one that may be shared, and the copy has no
		// flags, so those that were set in it before would be lost.
		if err := im.fixL1(l1, i); err != nil {
			return err
		}
		for index := 0; index < g.l2Entries; index += perSlice {
			if err := im.fixSlice(l1, i, index); err != nil {
				return err
			}
		}
		if err := im.pause(); err != nil {
			return err
		}
	}
	return nil
}

// fixSlice fixes the slice that begins at entry index of the L2 table of L1
// entry i. It claims in the order of a write: the clusters, then the L1 entry.
func (im *Image) fixSlice(l1 *l1Table, i, index int) error {
	g := &im.geo
	perSlice := g.sliceBytes / entryBytes
	c := guestCluster(i)<<g.l2Bits + guestCluster(index)
	held := im.claims.acquire(im.claimKey(c), uint64(c), uint64(perSlice))
	defer im.claims.release(held)
	heldL1 := im.l1Claims.acquire(uint64(i), uint64(i), 1)
	defer im.l1Claims.release(heldL1)

	table := l1.load(i).offset()
	r := g.l2Run(table, c)
	t, err := im.handle.Get(classL2, int64(table)+r.slice)
	if err != nil {
		return err
	}
	buf := sliceBuffers.Get().(*[maxSliceBytes / entryBytes]uint64)
	defer sliceBuffers.Put(buf)
	words := buf[:perSlice]
	t.Words(words, 0)
	t.Unpin()
	changed, err := im.fixWords(words)
	if err != nil {
		return err
	}
	if !changed {
		return nil
	}
	if t, err = im.handle.Get(classL2, int64(table)+r.slice); err != nil {
		return err
	}
	t.SetWords(0, words)
	t.Unpin()
	return nil
}

// fixWords fixes the entries of an L2 slice, and reports whether any changed.
// Refcounts are looked up for runs of neighbouring host clusters at once.
func (im *Image) fixWords(words []uint64) (changed bool, err error) {
	g := &im.geo
	var alone bool
	var known run // clusters whose refcount is 1, or is not, as alone says
	for k, word := range words {
		e := l2Entry(word)
		if e.compressed() || e.offset() == 0 {
			continue
		}
		c := g.hostCluster(e.offset())
		if c < known.first || c >= known.first+hostCluster(known.n) {
			count, n, err := im.refcountRun(c, int64(len(words)-k))
			if err != nil {
				return changed, err
			}
			alone, known = count == 1, run{c, n}
		}
		if now := makeL2(e.offset(), alone, e.zero()); now != e {
			words[k] = uint64(now)
			changed = true
		}
	}
	return changed, nil
}

// fixL1 fixes L1 entry i.
func (im *Image) fixL1(l1 *l1Table, i int) error {
	held := im.l1Claims.acquire(uint64(i), uint64(i), 1)
	defer im.l1Claims.release(held)
	off := l1.load(i).offset()
	n, err := im.refcount(im.geo.hostCluster(off))
	if err != nil {
		return err
	}
	if now := makeL1(off, n == 1); now != l1.load(i) {
		return im.storeL1(i, now)
	}
	return nil
}
