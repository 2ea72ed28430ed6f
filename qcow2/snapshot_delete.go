package qcow2

import (
	"context"
	"fmt"
	"slices"
)

// DeleteSnapshot removes the internal snapshot id (an ID, or else a name). The
// commit comes first; refcounts fall and COPIED flags return afterwards, while
// writers go on. A crash in between leaves leaks and the dirty bit.
func (im *Image) DeleteSnapshot(ctx context.Context, id string) error {
	im.structural.Lock()
	defer im.structural.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := im.writable(); err != nil {
		return err
	}
	records := im.snapshots()
	at, err := findSnapshot(records, id)
	if err != nil {
		return err
	}
	record := records[at]
	entries, err := im.readSnapshotL1(&record)
	if err != nil {
		return err
	}
	// What is committed is finished: a caller that leaves does not stop it.
	ctx = context.WithoutCancel(ctx)
	err = im.whileDirty(func() (bool, error) {
		if err := im.removeRecord(record.id); err != nil {
			_, there := findSnapshot(im.snapshots(), record.id)
			return there == nil, err // for lack of space: nothing has changed
		}
		if err := im.lowerTree(entries); err != nil {
			return false, err
		}
		err := im.fixCopied(ctx)
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("qcow2: delete snapshot %q: %w", id, err)
	}
	return nil
}

// removeRecord takes the snapshot with this ID out of the snapshot table,
// durably, and frees its L1 table; what that reaches stays counted.
func (im *Image) removeRecord(id string) error {
	records := im.snapshots()
	at, err := findSnapshot(records, id)
	if err != nil {
		return err
	}
	r := &records[at]
	if err := im.switchSnapshots(slices.Delete(slices.Clone(records), at, at+1)); err != nil {
		return err
	}
	clusters := im.geo.clusters(int64(r.l1Size) * entryBytes)
	return im.lower(run{im.geo.hostCluster(r.l1Offset), clusters}, true)
}

// lowerTree lowers the refcounts of all that entries, an L1 table, reach. What
// falls to 0 is free at once: the caller has made sure that no reference
// through entries is in the file or in a request any more.
func (im *Image) lowerTree(entries []uint64) error {
	for i, e := range entries {
		table := l1Entry(e).offset()
		if table == 0 {
			continue
		}
		if !im.geo.aligned(table) {
			return corruptf("L1 entry", HostOffset(i*entryBytes), "L2 table offset %#x is not aligned to a cluster", uint64(table))
		}
		if err := im.lowerTable(table); err != nil {
			return err
		}
		if err := im.pause(); err != nil {
			return err
		}
	}
	return nil
}

// lowerTable lowers the refcounts of all that the L2 table at off maps, and then its own.
func (im *Image) lowerTable(off HostOffset) error {
	err := im.eachSlice(off, func(_ int64, l2 []uint64) error {
		return im.eachRun(l2, func(r run) error { return im.lower(r, false) })
	})
	if err != nil {
		return err
	}
	return im.lower(run{im.geo.hostCluster(off), 1}, true)
}
