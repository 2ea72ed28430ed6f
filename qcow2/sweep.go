package qcow2

import (
	"context"
	"fmt"
)

// A sweep walks every L2 table that an L1 table names, slice by slice.

// sweep calls visit with each slice of each L2 table of entries: its place, and
// its entries in a buffer that visit may keep until it returns.
func (im *Image) sweep(ctx context.Context, entries []uint64, visit func(table HostOffset, slice int64, l2 []uint64) error) error {
	g := &im.geo
	words := make([]uint64, g.sliceBytes/entryBytes)
	for i, e := range entries {
		table := l1Entry(e).offset()
		if table == 0 {
			continue
		}
		if !g.aligned(table) {
			return corruptf("L1 entry", HostOffset(i*entryBytes), "L2 table offset %#x is not aligned to a cluster", uint64(table))
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		for slice := int64(0); slice < g.clusterSize; slice += int64(g.sliceBytes) {
			t, err := im.handle.Get(classL2, int64(table)+slice)
			if err != nil {
				return err
			}
			t.Words(words, 0)
			t.Unpin()
			if err := visit(table, slice, words); err != nil {
				return err
			}
		}
	}
	return nil
}

// addTree adds delta (+1 or -1) to the refcounts of all that entries, an L1
// table, reach: L2 tables and clusters. What falls to 0 is free at once: the
// caller has made sure that nothing refers to it any more, in the file or in a
// request. If raising fails, what was raised is lowered again.
func (im *Image) addTree(ctx context.Context, entries []uint64, delta int) error {
	var raised []run
	var changed int64
	change := func(r run, table bool) error {
		if delta < 0 {
			return im.reclaimRun(quarantined{run: r, table: table})
		}
		err := im.addRefcounts(r.first, r.n, delta)
		if err == nil {
			changed += r.n
			if len(raised) < maxUndo {
				raised = append(raised, r)
			}
		}
		return err
	}
	err := im.sweep(ctx, entries, func(_ HostOffset, _ int64, l2 []uint64) error {
		return im.eachRun(l2, func(r run) error { return change(r, false) })
	})
	if err == nil {
		for _, e := range entries {
			if table := l1Entry(e).offset(); table != 0 && err == nil {
				err = change(run{im.geo.hostCluster(table), 1}, true)
			}
		}
	}
	if err != nil && delta > 0 {
		undone := int64(0)
		for _, r := range raised {
			if im.addRefcounts(r.first, r.n, -delta) == nil {
				undone += r.n
			}
		}
		if undone != changed {
			return fmt.Errorf("%w (%d clusters leak until the image is repaired)", err, changed-undone)
		}
	}
	return err
}

// maxUndo bounds the memory of an undo; runs beyond it leak.
const maxUndo = 1 << 20

// eachRun calls use with the host clusters that the entries of an L2 slice refer
// to, in runs.
func (im *Image) eachRun(l2 []uint64, use func(run) error) error {
	g := &im.geo
	var r run
	emit := func(first hostCluster, n int64) error {
		if r.n > 0 && first == r.first+hostCluster(r.n) {
			r.n += n
			return nil
		}
		last := r
		r = run{first, n}
		if last.n == 0 {
			return nil
		}
		return use(last)
	}
	for _, word := range l2 {
		e := l2Entry(word)
		var err error
		switch e.kind() {
		case kindNormal, kindZeroAllocated:
			if !g.aligned(e.offset()) {
				return corruptf("L2 entry", e.offset(), "host offset is not aligned to a cluster")
			}
			err = emit(g.hostCluster(e.offset()), 1)
		case kindCompressed:
			off, n := e.compressedRange(g)
			first := g.hostCluster(off)
			err = emit(first, int64(g.hostCluster(off+HostOffset(n-1))-first)+1)
		}
		if err != nil {
			return err
		}
	}
	if r.n == 0 {
		return nil
	}
	return use(r)
}

// clearCopied clears COPIED in the active L1 table and all its L2 tables: a
// snapshot shares everything now.
func (im *Image) clearCopied(ctx context.Context) error {
	return im.setCopied(ctx, func(hostCluster) (bool, error) { return false, nil })
}

// fixCopied sets COPIED where the refcount is 1, in the active L1 table and all
// its L2 tables, and clears it elsewhere.
func (im *Image) fixCopied(ctx context.Context) error {
	return im.setCopied(ctx, func(c hostCluster) (bool, error) {
		n, err := im.refcount(c)
		return n == 1, err
	})
}

// setCopied makes each COPIED flag of the active tables what alone says of the
// cluster that the entry refers to. Only entries that change are stored.
func (im *Image) setCopied(ctx context.Context, alone func(hostCluster) (bool, error)) error {
	g := &im.geo
	l1 := im.l1.Load()
	entries := l1.snapshot()
	err := im.sweep(ctx, entries, func(table HostOffset, slice int64, l2 []uint64) error {
		for i, word := range l2 {
			e := l2Entry(word)
			if e.compressed() || e.offset() == 0 {
				continue
			}
			copied, err := alone(g.hostCluster(e.offset()))
			if err != nil {
				return err
			}
			if copied != e.copied() {
				now := makeL2(e.offset(), copied, e.zero())
				if err := im.storeL2(l2Run{table, slice, i}, []l2Entry{now}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for i := 0; i < len(entries) && err == nil; i++ {
		e := l1Entry(entries[i])
		if e.offset() == 0 {
			continue
		}
		var copied bool
		if copied, err = alone(g.hostCluster(e.offset())); err == nil && copied != e.copied() {
			err = im.storeL1(i, makeL1(e.offset(), copied))
		}
	}
	return err
}
