package qcow2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"
)

// CreateSnapshot takes an internal snapshot: all writes that returned before
// the call are in it, none that starts after it has returned. It is durable
// when it returns. An empty s.ID gets the next free decimal number, as QEMU
// numbers them; a zero Date is now.
//
// It has three parts, of which only the first keeps writers out:
//
//	cut     Wait for the writes under way, copy the L1 table, clear COPIED in
//	        it: from here on no write goes to a cluster in place.
//	sweep   Table by table, raise the refcounts of what it maps and clear its
//	        COPIED flags. A write to a table that was not swept yet sweeps it
//	        first, and then, as it is shared, copies it.
//	commit  Make all that durable, then the new snapshot table, then switch
//	        the header to it.
//
// A crash before the commit leaves raised refcounts and the dirty bit, which
// makes the next opener repair them. Errors before it are undone the same way
// as the sweep went.
func (im *Image) CreateSnapshot(ctx context.Context, s Snapshot) (Snapshot, error) {
	taken, err := CreateSnapshots(ctx, []SnapshotRequest{{im, s}})
	if err != nil {
		return Snapshot{}, err
	}
	return taken[0], nil
}

// A SnapshotRequest asks for a snapshot of an image.
type SnapshotRequest struct {
	Image    *Image
	Snapshot Snapshot
}

// CreateSnapshots takes a snapshot of each of several images, as CreateSnapshot
// does, at one point in time: a write that is in one of them was issued before
// every write that is in none. All or none exist when it returns; after a crash
// in between, some may, and after an error on a host that is full, which lets none be
// removed again: Snapshots tells. No image may occur twice.
func CreateSnapshots(ctx context.Context, requests []SnapshotRequest) ([]Snapshot, error) {
	return CreateSnapshotsWithin(ctx, requests, func(cut func()) error {
		cut()
		return nil
	})
}

// CreateSnapshotsWithin is CreateSnapshots whose cut, which takes milliseconds,
// happens when within calls it: around it the caller can quiesce those who write
// to the images. Sweep and commit follow after within has returned nil; its
// error, and a cut that it did not call, undo everything.
func CreateSnapshotsWithin(ctx context.Context, requests []SnapshotRequest, within func(cut func()) error) ([]Snapshot, error) {
	if len(requests) == 0 {
		return nil, nil
	}
	members := make([]*member, len(requests))
	for i, r := range requests {
		members[i] = &member{im: r.Image, request: r.Snapshot}
	}
	unlock := lockStructural(members)
	defer unlock()
	for _, m := range members {
		if err := m.im.writable(); err != nil {
			return nil, m.explain(err)
		}
		if err := m.im.admitSnapshot(&m.request); err != nil {
			return nil, m.explain(err)
		}
	}
	err := takeAll(ctx, members, within)
	taken := make([]Snapshot, len(members))
	for i, m := range members {
		err = errors.Join(err, m.finish(context.WithoutCancel(ctx), err))
		taken[i] = m.record.public()
	}
	if err != nil {
		return nil, err
	}
	return taken, nil
}

// A member is an image of which a snapshot is being taken.
type member struct {
	im        *Image
	request   Snapshot
	record    snapshotRecord
	dirty     bool // the dirty bit is set
	cut       *cut
	committed bool
}

// lockStructural locks the images of members in an order that all groups share.
func lockStructural(members []*member) (unlock func()) {
	ordered := slices.Clone(members)
	slices.SortFunc(ordered, func(a, b *member) int { return cmp.Compare(a.im.serial, b.im.serial) })
	for _, m := range ordered {
		m.im.structural.Lock()
	}
	return func() {
		for _, m := range ordered {
			m.im.structural.Unlock()
		}
	}
}

// takeAll cuts, sweeps and commits; what it leaves half done after an error,
// finish undoes.
func takeAll(ctx context.Context, members []*member, within func(cut func()) error) error {
	for _, m := range members {
		m.dirty = true
		if err := m.im.setIncompatible(incompatDirty, true); err != nil {
			return m.explain(err)
		}
	}
	err := within(func() { cutAll(members) })
	if err == nil && members[0].cut == nil {
		err = errors.New("qcow2: the snapshot was not cut")
	}
	if err != nil {
		return err
	}
	for _, m := range members {
		if err := m.im.sweepAll(ctx, m.cut); err != nil {
			return m.explain(err)
		}
	}
	for _, m := range members {
		m.record = newRecord(m.request, m.cut.size)
		if err := m.im.commitSnapshot(m.cut, &m.record); err != nil {
			return m.explain(err)
		}
		m.committed = true
	}
	return nil
}

func (m *member) explain(err error) error {
	return fmt.Errorf("qcow2: create snapshot %q: %w", m.request.Name, err)
}

// finish ends m's part of a group: the dirty bit goes if the snapshot was taken,
// or if the group failed with err and m could be put back as it was.
func (m *member) finish(ctx context.Context, err error) error {
	if !m.dirty {
		return nil
	}
	im := m.im
	if err == nil {
		im.cut.Store(nil)
		return im.endDirty(true)
	}
	undone := im.failed() == nil
	if undone && m.committed {
		if err := im.removeRecord(m.record.id); err != nil {
			_, there := findSnapshot(im.snapshots(), m.record.id)
			im.cut.Store(nil) // if it stays, for lack of space, it is whole
			return errors.Join(err, im.endDirty(there == nil && im.failed() == nil))
		}
	}
	if undone && m.cut != nil {
		undone = im.undoCut(ctx, m.cut) == nil
	}
	im.cut.Store(nil)
	return im.endDirty(undone)
}

// admitSnapshot checks that s can be added, and fills in what it leaves open.
func (im *Image) admitSnapshot(s *Snapshot) error {
	records := im.snapshots()
	if len(records) >= maxSnapshots {
		return fmt.Errorf("%w: the image has %d", ErrTooManySnapshots, len(records))
	}
	if uint64(len(records))+2 > im.geo.refcountMax {
		return fmt.Errorf("%w: refcounts of %d bits hold no more than %d snapshots", ErrRefcountOverflow, im.geo.refcountBits, len(records))
	}
	l1 := im.l1.Load()
	if err := im.checkL1("L1 entry", l1.off, l1.snapshot()); err != nil {
		return err
	}
	if s.ID == "" {
		s.ID = nextSnapshotID(records)
	}
	if len(s.ID) > maxSnapshotString || len(s.Name) > maxSnapshotString {
		return fmt.Errorf("%w: snapshot ID or name of more than %d bytes", ErrTooLarge, maxSnapshotString)
	}
	for i := range records {
		if records[i].id == s.ID {
			return fmt.Errorf("%w: ID %q", ErrSnapshotExists, s.ID)
		}
	}
	if s.Date.IsZero() {
		s.Date = time.Now()
	}
	return nil
}

// newRecord returns the record of s for a disk of size bytes, without its L1 table.
func newRecord(s Snapshot, size int64) snapshotRecord {
	return snapshotRecord{
		id: s.ID, name: s.Name,
		dateSec: uint32(s.Date.Unix()), dateNsec: uint32(s.Date.Nanosecond()),
		vmClockNsec: uint64(s.VMClock), vmStateSize: uint64(s.VMStateSize),
		diskSize: uint64(size), icount: icountNotRecorded,
	}
}

// A cut is the state of an image at one moment, on the way to a snapshot.
type cut struct {
	size    int64    // virtual size, bytes
	entries []uint64 // the L1 table
	// tables says how far each table of entries has come; guarded by the claim
	// of its L1 entry.
	tables []tableState
	failed atomic.Pointer[error] // why a table could not be swept, nil if none
}

type tableState uint8

const (
	tableUnswept tableState = iota
	tableSwept              // its refcounts are raised, its COPIED flags clear
	tableUndone             // the snapshot fails, or has: leave it alone
)

// cutAll waits for the requests under way on all images, and cuts them all
// while none can change any.
//
// Preconditions: members are locked by lockStructural, so that nobody else waits
// for two gates.
func cutAll(members []*member) {
	for _, m := range members {
		m.im.gate.Lock()
	}
	for _, m := range members {
		m.cut = m.im.makeCut()
	}
	for _, m := range members {
		m.im.gate.Unlock()
	}
}

// makeCut cuts. Preconditions: the gate is held alone.
func (im *Image) makeCut() *cut {
	l1 := im.l1.Load()
	c := &cut{size: im.size.Load(), entries: l1.snapshot()}
	if len(c.entries) == 0 { // a disk of no bytes; the snapshot's table has a place all the same
		c.entries = []uint64{0}
	}
	c.tables = make([]tableState, len(c.entries))
	for i := range l1.entries {
		if e := l1.entries[i].Load(); e&entryCopied != 0 {
			// The cache has the flag still; the sweep clears it there.
			l1.entries[i].Store(e &^ entryCopied)
		}
	}
	im.cut.Store(c)
	return c
}

// sweepAll sweeps every table of c.
func (im *Image) sweepAll(ctx context.Context, c *cut) error {
	for i, e := range c.entries {
		if l1Entry(e).offset() == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		im.making <- struct{}{} // writers that queue for a table go first
		held := im.l1Claims.acquire(uint64(i), uint64(i), 1)
		err := im.sweepTable(c, i)
		im.l1Claims.release(held)
		<-im.making
		if err == nil {
			err = im.pause()
		}
		if err != nil {
			return err
		}
	}
	if err := c.failed.Load(); err != nil { // of a writer that came first
		return *err
	}
	return nil
}

// sweepTable sweeps table i of c unless that is done. If it cannot, for lack of room
// in the refcounts say, there will be no snapshot: writers go on without it.
//
// Preconditions: the caller holds the claim of L1 entry i.
func (im *Image) sweepTable(c *cut, i int) error {
	e := l1Entry(c.entries[i])
	if e.offset() == 0 || c.tables[i] != tableUnswept {
		return nil
	}
	c.tables[i] = tableUndone
	err := im.raiseTable(e.offset())
	if err == nil {
		c.tables[i] = tableSwept
		// Nobody has replaced the active entry: that takes a swept table.
		err = im.storeL1(i, makeL1(e.offset(), false))
	}
	if err != nil {
		c.failed.Store(&err)
	}
	return err
}

// raiseTable raises the refcounts of the L2 table at off and of all that it
// maps, and clears its COPIED flags. On an error what was raised is lowered again.
func (im *Image) raiseTable(off HostOffset) error {
	var raised []run
	add := func(r run) error {
		err := im.addRefcounts(r.first, r.n, 1)
		if err == nil {
			raised = append(raised, r)
		}
		return err
	}
	err := im.eachSlice(off, func(slice int64, l2 []uint64) error {
		if err := im.eachRun(l2, add); err != nil {
			return err
		}
		return im.clearCopied(off, slice, l2)
	})
	if err == nil {
		err = add(run{im.geo.hostCluster(off), 1})
	}
	if err != nil {
		for _, r := range raised {
			// What cannot be lowered leaks until a repair.
			_ = im.addRefcounts(r.first, r.n, -1)
		}
	}
	return err
}

// clearCopied clears the COPIED flags of a slice whose entries are l2.
func (im *Image) clearCopied(table HostOffset, slice int64, l2 []uint64) error {
	flags := uint64(0)
	for i, e := range l2 {
		flags |= e & entryCopied
		l2[i] = e &^ entryCopied
	}
	if flags == 0 {
		return nil
	}
	t, err := im.handle.Get(classL2, int64(table)+slice)
	if err != nil {
		return err
	}
	t.SetWords(0, l2)
	t.Unpin()
	return nil
}

// commitSnapshot makes the snapshot of c part of the snapshot table, as record.
func (im *Image) commitSnapshot(c *cut, record *snapshotRecord) error {
	first, err := im.writeL1(c.entries) // makes the raised refcounts durable, too (E4)
	if err != nil {
		return err
	}
	record.l1Offset, record.l1Size = im.geo.hostOffset(first), uint32(len(c.entries))
	err = im.switchSnapshots(append(append([]snapshotRecord(nil), im.snapshots()...), *record))
	if err != nil && im.failed() == nil {
		im.free(first, im.geo.clusters(int64(len(c.entries))*entryBytes))
	}
	return err
}

// undoCut lowers what the sweep raised and puts the COPIED flags back.
func (im *Image) undoCut(ctx context.Context, c *cut) error {
	for i, e := range c.entries {
		held := im.l1Claims.acquire(uint64(i), uint64(i), 1)
		swept := c.tables[i] == tableSwept
		c.tables[i] = tableUndone
		im.l1Claims.release(held)
		if !swept {
			continue
		}
		if err := im.lowerTable(l1Entry(e).offset()); err != nil {
			return err
		}
		if err := im.pause(); err != nil {
			return err
		}
	}
	return im.fixCopied(ctx)
}
