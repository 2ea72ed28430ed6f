package qcow2

import (
	"context"
	"encoding/binary"
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

// public returns r as a Snapshot of an image of size bytes.
func (r *snapshotRecord) public(size int64) Snapshot {
	s := Snapshot{
		ID:          r.id,
		Name:        r.name,
		Date:        time.Unix(int64(r.dateSec), int64(r.dateNsec)),
		VMStateSize: int64(r.vmStateSize),
		VMClock:     time.Duration(r.vmClockNsec),
		ICount:      int64(r.icount),
		DiskSize:    int64(r.diskSize),
	}
	if r.diskSize == 0 {
		s.DiskSize = size
	}
	return s
}

// Snapshots lists the internal snapshots in table order.
func (im *Image) Snapshots() []Snapshot {
	var list []Snapshot
	size := im.size.Load()
	for _, r := range im.snapshots() {
		list = append(list, r.public(size))
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

// CreateSnapshot takes an internal snapshot: all writes that returned before
// the call are in it, none that starts after it has returned. It is durable
// when it returns. An empty s.ID gets the next free decimal number, as QEMU
// numbers them; a zero Date is now. Writers wait while it runs.
//
// The commit is the header's switch to the new snapshot table; a crash before
// it leaves leaks and the dirty bit, which makes the next opener repair them.
func (im *Image) CreateSnapshot(ctx context.Context, s Snapshot) (Snapshot, error) {
	if err := ctx.Err(); err != nil {
		return Snapshot{}, err
	}
	im.gate.Lock()
	defer im.gate.Unlock()
	if err := im.writable(); err != nil {
		return Snapshot{}, err
	}
	records := im.snapshots()
	if len(records) >= maxSnapshots {
		return Snapshot{}, fmt.Errorf("%w: the image has %d", ErrTooManySnapshots, len(records))
	}
	if uint64(len(records))+2 > im.geo.refcountMax {
		return Snapshot{}, fmt.Errorf("%w: refcounts of %d bits hold no more than %d snapshots", ErrRefcountOverflow, im.geo.refcountBits, len(records))
	}
	if s.ID == "" {
		s.ID = nextSnapshotID(records)
	}
	if len(s.ID) > maxSnapshotString || len(s.Name) > maxSnapshotString {
		return Snapshot{}, fmt.Errorf("%w: snapshot ID or name of more than %d bytes", ErrTooLarge, maxSnapshotString)
	}
	for i := range records {
		if records[i].id == s.ID {
			return Snapshot{}, fmt.Errorf("%w: ID %q", ErrSnapshotExists, s.ID)
		}
	}
	if s.Date.IsZero() {
		s.Date = time.Now()
	}
	record := snapshotRecord{
		id: s.ID, name: s.Name,
		dateSec: uint32(s.Date.Unix()), dateNsec: uint32(s.Date.Nanosecond()),
		vmClockNsec: uint64(s.VMClock), vmStateSize: uint64(s.VMStateSize),
		diskSize: uint64(im.size.Load()), icount: icountNotRecorded,
	}
	err := im.whileDirty(func() error {
		entries := im.l1.Load().snapshot()
		if err := im.addTree(ctx, entries, 1); err != nil {
			return err
		}
		return im.commitSnapshot(ctx, entries, record)
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("qcow2: create snapshot %q: %w", s.Name, err)
	}
	return record.public(im.size.Load()), nil
}

// maxSnapshotString is the longest ID or name that fits its 16-bit length field.
const maxSnapshotString = 1<<16 - 1

// commitSnapshot clears the COPIED flags that are not true any more, and makes
// the snapshot of entries part of the table.
func (im *Image) commitSnapshot(ctx context.Context, entries []uint64, record snapshotRecord) error {
	if err := im.clearCopied(ctx); err != nil {
		return err
	}
	first, err := im.writeL1(entries) // makes the raised refcounts durable, too (E4)
	if err != nil {
		return err
	}
	record.l1Offset, record.l1Size = im.geo.hostOffset(first), uint32(len(entries))
	return im.switchSnapshots(append(append([]snapshotRecord(nil), im.snapshots()...), record))
}

// switchSnapshots writes the snapshot table of records, makes it durable, and
// commits it with one write of 12 bytes of the header (E5).
//
// Preconditions: the gate is held alone.
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
	if oldBytes > 0 {
		im.release(g.hostCluster(oldOff), g.clusters(oldBytes), true)
	}
	return nil
}

// DeleteSnapshot removes the internal snapshot id (an ID, or else a name). The
// commit comes first; a crash after it leaves leaks. Writers wait while it runs.
func (im *Image) DeleteSnapshot(ctx context.Context, id string) error {
	im.gate.Lock()
	defer im.gate.Unlock()
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
	rest := append(append([]snapshotRecord(nil), records[:at]...), records[at+1:]...)
	err = im.whileDirty(func() error {
		if err := im.switchSnapshots(rest); err != nil {
			return err
		}
		if err := im.addTree(context.WithoutCancel(ctx), entries, -1); err != nil {
			return err
		}
		clusters := im.geo.clusters(int64(record.l1Size) * entryBytes)
		if err := im.reclaimRun(quarantined{run: run{im.geo.hostCluster(record.l1Offset), clusters}, table: true}); err != nil {
			return err
		}
		return im.fixCopied(context.WithoutCancel(ctx))
	})
	if err != nil {
		return fmt.Errorf("qcow2: delete snapshot %q: %w", id, err)
	}
	return nil
}

// ApplySnapshot makes the active state equal to the internal snapshot id (an
// ID, or else a name), its virtual size included. The snapshot stays. A crash
// leaves the old state or the new one: the active L1 table is not overwritten
// but replaced by a new one through the header. Writers wait while it runs.
func (im *Image) ApplySnapshot(ctx context.Context, id string) error {
	im.gate.Lock()
	defer im.gate.Unlock()
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
	size := im.size.Load()
	if records[at].diskSize != 0 {
		size = int64(records[at].diskSize)
	}
	for int64(len(entries)) < im.geo.l1EntriesFor(size) {
		entries = append(entries, 0)
	}
	err = im.whileDirty(func() error {
		if err := im.addTree(ctx, entries, 1); err != nil {
			return err
		}
		for i := range entries {
			entries[i] &^= entryCopied
		}
		first, err := im.writeL1(entries)
		if err != nil {
			return err
		}
		old := im.l1.Load().snapshot()
		if err := im.switchL1(newL1Table(im.geo.hostOffset(first), entries), size); err != nil {
			return err
		}
		im.epochs.synchronize() // readers of the old state
		if err := im.addTree(context.WithoutCancel(ctx), old, -1); err != nil {
			return err
		}
		return im.fixCopied(context.WithoutCancel(ctx))
	})
	if err != nil {
		return fmt.Errorf("qcow2: apply snapshot %q: %w", id, err)
	}
	return nil
}

// readSnapshotL1 reads the L1 table of a snapshot.
func (im *Image) readSnapshotL1(r *snapshotRecord) ([]uint64, error) {
	if uint64(r.l1Size)*entryBytes > maxL1Bytes || !im.geo.aligned(r.l1Offset) || r.l1Offset >= maxHostOffset {
		return nil, corruptf("snapshot L1 table", r.l1Offset, "%d entries at an offset that is not allowed", r.l1Size)
	}
	return readTable(im.f, "snapshot L1 table", r.l1Offset, int(r.l1Size))
}

// whileDirty runs change with the dirty bit set in the file (E7): refcounts and
// COPIED flags pass through states that only a repair explains. If change fails
// the bit stays, and the next opener repairs the image.
//
// Preconditions: the gate is held alone.
func (im *Image) whileDirty(change func() error) error {
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	if err := im.setIncompatible(incompatDirty, true); err != nil {
		return err
	}
	if err := change(); err != nil {
		im.unclean = true
		return err
	}
	if err := im.handle.WriteBack(); err != nil || im.unclean {
		return err
	}
	return im.setIncompatible(incompatDirty, false)
}
