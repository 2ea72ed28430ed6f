package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
)

// Resize changes the virtual size, up only, rounded up to 512 bytes. New bytes
// read as zeroes. The change is durable when it returns; a crash leaves the old
// size or the new one. Writers wait while it runs.
//
// Errors: ErrOutOfRange for a smaller size, ErrTooLarge beyond the format's limits.
func (im *Image) Resize(ctx context.Context, size int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	im.structural.Lock()
	defer im.structural.Unlock()
	im.gate.Lock()
	defer im.gate.Unlock()
	if err := im.writable(); err != nil {
		return err
	}
	old := im.size.Load()
	if size < old {
		return fmt.Errorf("%w: an image of %d bytes cannot shrink to %d", ErrOutOfRange, old, size)
	}
	if size > maxVirtualSize-512 {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, size)
	}
	size = (size + 511) &^ 511
	if size == old {
		return nil
	}
	if im.version < 3 && len(im.snapshots()) > 0 {
		return fmt.Errorf("%w: resize of a version 2 image with internal snapshots", ErrUnsupported)
	}
	if err := im.dropBeyond(old, size); err != nil {
		return err
	}
	if err := im.growL1(size); err != nil {
		return err
	}
	if err := im.zeroGrown(old, size); err != nil {
		return err
	}
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	var field [8]byte
	binary.BigEndian.PutUint64(field[:], uint64(size))
	if err := im.writeHeader(hdrOffSize, field[:]); err != nil {
		return err
	}
	im.hdrMu.Lock()
	im.hdr.size = uint64(size)
	im.hdrMu.Unlock()
	im.size.Store(size)
	return nil
}

// dropBeyond unmaps what the tables map in whole clusters of [old, size): the VM
// state of a snapshot that was applied lies behind the end of the disk.
//
// Preconditions: the gate is held alone.
func (im *Image) dropBeyond(old, size int64) error {
	g := &im.geo
	mapped := guestCluster(len(im.l1.Load().entries)) << g.l2Bits
	end := min(guestCluster(g.clusters(size)), mapped)
	for c := guestCluster(g.clusters(old)); c < end; {
		n, err := im.remap(c, int64(end-c), func(l2Entry) (l2Entry, bool) { return 0, true })
		if err != nil {
			return err
		}
		c += guestCluster(n)
	}
	return nil
}

// zeroGrown makes [old, size) read as zeroes where it would not: in the rest of
// the last cluster, and where a longer backing file would show through.
//
// Preconditions: the gate is held alone; the L1 table covers size.
func (im *Image) zeroGrown(old, size int64) error {
	end := min(size, im.geo.roundUp(old))
	if b := im.base(); b != nil {
		end = max(end, min(size, b.Size()))
	}
	if end <= old {
		return nil
	}
	return im.writeZeroes(old, end-old, false)
}

// growL1 gives the active L1 table room for a disk of size bytes: a new table,
// durable before the header names it (E6).
//
// Preconditions: the gate is held alone.
func (im *Image) growL1(size int64) error {
	g := &im.geo
	l1 := im.l1.Load()
	need := g.l1EntriesFor(size)
	if need <= int64(len(l1.entries)) {
		return nil
	}
	if need*entryBytes > maxL1Bytes {
		return fmt.Errorf("%w: %d bytes need an L1 table beyond %d bytes; a larger cluster size avoids it", ErrTooLarge, size, maxL1Bytes)
	}
	entries := make([]uint64, need)
	copy(entries, l1.snapshot())
	first, err := im.writeL1(entries)
	if err != nil {
		return err
	}
	return im.switchL1(newL1Table(g.hostOffset(first), entries), im.size.Load())
}

// writeL1 writes entries as a new table and makes everything stored so far durable.
func (im *Image) writeL1(entries []uint64) (hostCluster, error) {
	g := &im.geo
	clusters := g.clusters(int64(len(entries)) * entryBytes)
	first, err := im.allocTable(clusters)
	if err != nil {
		return 0, err
	}
	if err := im.createTable(classL1, g.hostOffset(first), clusters, entries); err != nil {
		return 0, err
	}
	return first, im.handle.WriteBack()
}

// switchL1 makes l1, which is durable, the active L1 table of a disk of size
// bytes, and releases the old table's clusters. The commit is one write of the
// header's bytes 24 to 47.
func (im *Image) switchL1(l1 *l1Table, size int64) error {
	g := &im.geo
	var field [24]byte
	im.hdrMu.Lock()
	binary.BigEndian.PutUint64(field[0:], uint64(size))
	binary.BigEndian.PutUint32(field[8:], im.hdr.cryptMethod)
	binary.BigEndian.PutUint32(field[12:], uint32(len(l1.entries)))
	binary.BigEndian.PutUint64(field[16:], uint64(l1.off))
	im.hdrMu.Unlock()
	if err := im.writeHeader(hdrOffSize, field[:]); err != nil {
		return err
	}
	old := im.l1.Swap(l1)
	im.size.Store(size)
	im.hdrMu.Lock()
	im.hdr.size, im.hdr.l1Size, im.hdr.l1Offset = uint64(size), uint32(len(l1.entries)), l1.off
	im.hdrMu.Unlock()
	_ = im.guardTables() // an overlap was refused at open, and alloc makes none
	if n := g.clusters(int64(len(old.entries)) * entryBytes); n > 0 {
		im.release(g.hostCluster(old.off), n, true)
	}
	return nil
}
