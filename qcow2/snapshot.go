package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// A Snapshot describes an internal snapshot.
type Snapshot struct {
	ID          string // unique in the image
	Name        string
	Date        time.Time
	VMStateSize int64         // bytes
	VMClock     time.Duration // guest run time
	ICount      int64         // -1 if not recorded
	DiskSize    int64         // virtual size when it was taken, bytes
}

// public returns r as a Snapshot.
func (r *snapshotRecord) public() Snapshot {
	return Snapshot{
		ID:          r.id,
		Name:        r.name,
		Date:        time.Unix(int64(r.dateSec), int64(r.dateNsec)),
		VMStateSize: int64(r.vmStateSize),
		VMClock:     time.Duration(r.vmClockNsec),
		ICount:      int64(r.icount),
		DiskSize:    int64(r.diskSize),
	}
}

// Snapshots lists the internal snapshots in table order.
func (im *Image) Snapshots() []Snapshot {
	var list []Snapshot
	for _, r := range im.snapshots() {
		list = append(list, r.public())
	}
	return list
}

// snapshots returns the records. They are never changed, only replaced.
func (im *Image) snapshots() []snapshotRecord {
	im.hdrMu.Lock()
	defer im.hdrMu.Unlock()
	return im.records
}

// findSnapshot returns the index of the record with this ID, or else this name.
func findSnapshot(records []snapshotRecord, id string) (int, error) {
	for i := range records {
		if records[i].id == id {
			return i, nil
		}
	}
	for i := range records {
		if records[i].name == id {
			return i, nil
		}
	}
	return 0, fmt.Errorf("%w: %q", ErrSnapshotNotFound, id)
}

// nextSnapshotID returns the decimal number after the highest one in use.
func nextSnapshotID(records []snapshotRecord) string {
	highest := uint64(0)
	for i := range records {
		if n, err := strconv.ParseUint(records[i].id, 10, 64); err == nil {
			highest = max(highest, n)
		}
	}
	return strconv.FormatUint(highest+1, 10)
}

// maxSnapshotString is the longest ID or name that fits its 16-bit length field.
const maxSnapshotString = 1<<16 - 1

// switchSnapshots writes the snapshot table of records, makes it durable, and
// commits it with one write of 12 bytes of the header (E5).
//
// Preconditions: im.structural is held.
func (im *Image) switchSnapshots(records []snapshotRecord) error {
	g := &im.geo
	raw := encodeSnapshotTable(records)
	var first hostCluster
	if len(raw) > 0 {
		if len(raw) > maxSnapshotTable {
			return fmt.Errorf("%w: the snapshot table would pass %d bytes", ErrTooManySnapshots, maxSnapshotTable)
		}
		words := make([]uint64, len(raw)/entryBytes) // records are padded to 8 bytes
		for i := range words {
			words[i] = binary.BigEndian.Uint64(raw[i*entryBytes:])
		}
		var err error
		if first, err = im.writeL1(words); err != nil {
			return err
		}
	}
	var field [12]byte
	binary.BigEndian.PutUint32(field[0:], uint32(len(records)))
	binary.BigEndian.PutUint64(field[4:], uint64(g.hostOffset(first)))
	if err := im.writeHeader(hdrOffNbSnapshots, field[:]); err != nil {
		return err
	}
	im.hdrMu.Lock()
	oldOff, oldBytes := im.hdr.snapshotsOffset, im.recordsBytes
	im.hdr.nbSnapshots, im.hdr.snapshotsOffset = uint32(len(records)), g.hostOffset(first)
	im.records, im.recordsBytes = records, int64(len(raw))
	im.hdrMu.Unlock()
	_ = im.guardTables() // an overlap was refused at open, and alloc makes none
	if oldBytes > 0 {
		im.release(g.hostCluster(oldOff), g.clusters(oldBytes), true)
	}
	return nil
}

// readSnapshotL1 reads the L1 table of a snapshot.
func (im *Image) readSnapshotL1(r *snapshotRecord) ([]uint64, error) {
	if uint64(r.l1Size)*entryBytes > maxL1Bytes || !im.geo.aligned(r.l1Offset) || r.l1Offset >= maxHostOffset {
		return nil, corruptf("snapshot L1 table", r.l1Offset, "%d entries at an offset that is not allowed", r.l1Size)
	}
	entries, err := readTable(im.f, "snapshot L1 table", r.l1Offset, int(r.l1Size))
	if err != nil {
		return nil, err
	}
	return entries, im.checkL1("snapshot L1 entry", r.l1Offset, entries)
}

// checkL1 validates the entries of the L1 table at off, before anything that
// needs all of them changes the image.
func (im *Image) checkL1(structure string, off HostOffset, entries []uint64) error {
	for i, e := range entries {
		entryOff := off + HostOffset(i*entryBytes)
		if r := l1Entry(e).reserved(); r != 0 {
			return corruptf(structure, entryOff, "reserved bits %#x are set", r)
		}
		table := l1Entry(e).offset()
		if !im.geo.aligned(table) {
			return corruptf(structure, entryOff, "L2 table offset %#x is not aligned to a cluster", uint64(table))
		}
		if table == 0 {
			continue
		}
		if err := im.checkUnguarded("L2 table", table, im.geo.clusterSize); err != nil {
			return err
		}
	}
	return nil
}

// whileDirty runs change with the dirty bit set in the file (E7): refcounts and
// COPIED flags pass through states that only a repair explains. If change says
// that it has left the image in one, the bit stays, and the next opener repairs it.
//
// Preconditions: im.structural is held.
func (im *Image) whileDirty(change func() (whole bool, err error)) error {
	if err := im.setIncompatible(incompatDirty, true); err != nil {
		return err
	}
	whole, err := change()
	return errors.Join(err, im.endDirty(whole && im.failed() == nil))
}

// endDirty makes what was changed durable and clears the dirty bit, unless this
// or an earlier change was left half done.
func (im *Image) endDirty(whole bool) error {
	if !whole {
		im.unclean = true
	}
	if im.unclean {
		return nil
	}
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	return im.setIncompatible(incompatDirty, false)
}
