package qcow2

import (
	"context"
	"errors"
	"fmt"
)

// ApplySnapshot makes the active state equal to the internal snapshot id (an
// ID, or else a name), its virtual size included. The snapshot stays. A crash
// leaves the old state or the new one: the active L1 table is not overwritten
// but replaced by a new one through the header. Writers wait while it runs:
// nobody has a use for a disk that changes under it.
func (im *Image) ApplySnapshot(ctx context.Context, id string) error {
	im.structural.Lock()
	defer im.structural.Unlock()
	im.gate.Lock()
	defer im.gate.Unlock()
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
	entries, err := im.readSnapshotL1(&records[at])
	if err != nil {
		return err
	}
	size := int64(records[at].diskSize)
	if need := im.geo.l1EntriesFor(size); need > int64(len(entries)) {
		if !records[at].incomplete {
			return corruptf("snapshot L1 table", records[at].l1Offset, "%d entries do not cover the snapshot's %d bytes", len(entries), size)
		}
		entries = append(entries, make([]uint64, need-int64(len(entries)))...)
	}
	ctx = context.WithoutCancel(ctx)
	// The state that comes back may refer to clusters that wait in the
	// quarantine for one reference less: fixCopied must not count that one.
	im.epochs.synchronize()
	if err := im.settle(); err != nil {
		return err
	}
	err = im.whileDirty(func() (bool, error) { return im.replaceState(ctx, entries, size) })
	if err != nil {
		return fmt.Errorf("qcow2: apply snapshot %q: %w", id, err)
	}
	return nil
}

// replaceState makes entries, the L1 table of a snapshot, the active one. It
// reports whether the image is whole: also after an error that came before the
// switch, for lack of space or of room in the refcounts.
func (im *Image) replaceState(ctx context.Context, entries []uint64, size int64) (whole bool, err error) {
	raised, err := im.raiseTree(entries)
	var first hostCluster
	if err == nil {
		first, err = im.writeL1(entries)
	}
	if err != nil {
		undo := im.lowerTree(entries[:raised])
		return undo == nil, errors.Join(err, undo)
	}
	old := im.l1.Load().snapshot()
	if err := im.switchL1(newL1Table(im.geo.hostOffset(first), entries), size); err != nil {
		return false, err
	}
	im.epochs.synchronize() // readers of the old state
	if err := im.lowerTree(old); err != nil {
		return false, err
	}
	err = im.fixCopied(ctx)
	return err == nil, err
}

// raiseTree raises the refcounts of all that entries, an L1 table of a snapshot,
// reach, and clears the COPIED flags in it. It returns for how many entries it did.
func (im *Image) raiseTree(entries []uint64) (raised int, err error) {
	for i := range entries {
		entries[i] &^= entryCopied
		if table := l1Entry(entries[i]).offset(); table != 0 {
			if err := im.raiseTable(table); err != nil {
				return i, err
			}
		}
	}
	return len(entries), nil
}
