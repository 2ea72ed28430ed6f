package qcow2

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
)

// guard knows which host clusters hold the header and the tables that do not
// pass through L2 entries: guest data must never be written there, and an L2
// table must not lie there. A valid image never asks for it. A broken one may,
// by an entry that points into a table or by a refcount of 0 on one, and would
// destroy itself, or let its guest write its own metadata.
//
// The runs are a sorted slice that is replaced, never changed, so that a write
// looks it up without a lock or an allocation. QEMU's overlap check compares
// every write with every table instead.
//
// L2 tables are not among the runs: there are too many of them to look up, and
// they come and go with every write to a snapshot's clusters. An entry that
// names its own table is refused by checkL2; Check finds the others.
type guard struct {
	mu   sync.Mutex // serialises replacement
	runs atomic.Pointer[[]guarded]
}

// A guarded is a run of host clusters, [first, end).
type guarded struct {
	first, end hostCluster
	what       guardedKind
}

type guardedKind uint8

const (
	guardHeader guardedKind = iota
	guardL1
	guardReftable
	guardRefblock
	guardSnapshots
	guardSnapshotL1
)

var guardedNames = [...]string{"header", "active L1 table", "refcount table", "refcount block", "snapshot table", "snapshot L1 table"}

// guardTables takes over where the tables of the image are now. It is called
// after one has moved and before what it left is released. The error says that
// two of them overlap.
func (im *Image) guardTables() error {
	gu, g, a := &im.guard, &im.geo, &im.allocator
	gu.mu.Lock()
	defer gu.mu.Unlock()
	runs := []guarded{{0, 1, guardHeader}}
	add := func(what guardedKind, off HostOffset, bytes int64) {
		if first := g.hostCluster(off); bytes > 0 {
			runs = append(runs, guarded{first, first + hostCluster(g.clusters(bytes)), what})
		}
	}
	l1 := im.l1.Load()
	add(guardL1, l1.off, int64(len(l1.entries))*entryBytes)
	a.mu.Lock()
	reftable, reftableOff := a.table(), a.reftableOff
	a.mu.Unlock()
	add(guardReftable, reftableOff, int64(len(reftable))*entryBytes)
	for t := range reftable {
		// A bad entry is reported to whoever needs it.
		if off, err := g.refblockAt(reftable, t); err == nil && off != 0 {
			add(guardRefblock, off, g.clusterSize)
		}
	}
	im.hdrMu.Lock()
	add(guardSnapshots, im.hdr.snapshotsOffset, im.recordsBytes)
	for i := range im.records {
		add(guardSnapshotL1, im.records[i].l1Offset, int64(im.records[i].l1Size)*entryBytes)
	}
	im.hdrMu.Unlock()
	slices.SortFunc(runs, func(a, b guarded) int { return cmp.Compare(a.first, b.first) })
	gu.runs.Store(&runs)
	for i := 1; i < len(runs); i++ {
		if prev, r := runs[i-1], runs[i]; r.first < prev.end {
			return corruptf(guardedNames[r.what], g.hostOffset(r.first), "overlaps the %s at %#x",
				guardedNames[prev.what], uint64(g.hostOffset(prev.first)))
		}
	}
	return nil
}

// guardRefblock adds a new refcount block: guardTables would look at all tables
// for each of them.
func (im *Image) guardRefblock(c hostCluster) {
	gu := &im.guard
	gu.mu.Lock()
	defer gu.mu.Unlock()
	old := *gu.runs.Load()
	at, _ := slices.BinarySearchFunc(old, c, func(r guarded, c hostCluster) int { return cmp.Compare(r.first, c) })
	runs := make([]guarded, 0, len(old)+1)
	runs = append(append(append(runs, old[:at]...), guarded{c, c + 1, guardRefblock}), old[at:]...)
	gu.runs.Store(&runs)
}

// checkUnguarded returns a *FormatError if one of n > 0 bytes at host lies in a
// guarded cluster; structure says what would lie there.
func (im *Image) checkUnguarded(structure string, host HostOffset, n int64) error {
	p := im.guard.runs.Load()
	if p == nil { // opened read-only
		return nil
	}
	first := im.geo.hostCluster(host)
	last := im.geo.hostCluster(host + HostOffset(n-1))
	runs := *p
	lo, hi := 0, len(runs) // the first run that ends after first
	for lo < hi {
		if mid := int(uint(lo+hi) / 2); runs[mid].end <= first {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == len(runs) || runs[lo].first > last {
		return nil
	}
	return corruptf(structure, host, "overlaps the %s at %#x; repair the image",
		guardedNames[runs[lo].what], uint64(im.geo.hostOffset(runs[lo].first)))
}
