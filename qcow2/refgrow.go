package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// addRefblock makes a refcount block for entry number table of the refcount
// table, and a larger refcount table if there is no such entry.
func (im *Image) addRefblock(table int) error {
	a := &im.allocator
	a.growMu.Lock()
	defer a.growMu.Unlock()
	return im.addRefblockLocked(table)
}

// addRefblockLocked is addRefblock with growMu held.
//
// The block is stored in the cache before the table entry that names it, and
// that before any entry of an L2 table that relies on it, so the order of
// classes (flush.go) brings them to the file in this order.
func (im *Image) addRefblockLocked(table int) error {
	a, g := &im.allocator, &im.geo
	a.mu.Lock()
	exists := table < len(a.table()) && a.table()[table] != 0
	full := table >= len(a.table())
	a.mu.Unlock()
	switch {
	case exists:
		return nil
	case full:
		return im.growReftable(table)
	}
	c, err := im.reserveTail(1)
	if err != nil {
		return err
	}
	home, _ := g.refblockIndex(c)
	if home != table {
		if err := im.addRefblockLocked(home); err != nil {
			return err
		}
	}
	if err := im.extendFileLocked(int64(g.hostOffset(c)) + g.clusterSize); err != nil {
		return err
	}
	if err := im.reserveSpace(c, 1); err != nil {
		return err
	}
	off := g.hostOffset(c)
	if err := im.createTable(classRefblock, off, 1, nil); err != nil {
		return err
	}
	a.mu.Lock()
	reftable := slices.Clone(a.table())
	reftableOff := a.reftableOff
	a.mu.Unlock()
	reftable[table] = uint64(off)
	if err := im.addRefcountsIn(reftable, c, 1, 1); err != nil {
		return err
	}
	if err := im.storeWord(classReftable, reftableOff, table, uint64(off)); err != nil {
		return err
	}
	a.mu.Lock()
	a.reftable.Store(&reftable)
	a.mu.Unlock()
	im.guardRefblock(c)
	return nil
}

// coverTail makes sure that refcount blocks exist for n clusters from first.
//
// Preconditions: growMu is held.
func (im *Image) coverTail(first hostCluster, n int64) error {
	from, _ := im.geo.refblockIndex(first)
	to, _ := im.geo.refblockIndex(first + hostCluster(n) - 1)
	for t := from; t <= to; t++ {
		if err := im.addRefblockLocked(t); err != nil {
			return err
		}
	}
	return nil
}

// growReftable replaces the refcount table by a larger one that has entry
// number table, and makes that entry's block and those that the new table and
// the new blocks need themselves. All of it is durable before the header names
// the new table, in one write of 12 bytes (E6); only then is it in force.
//
// Preconditions: growMu is held.
func (im *Image) growReftable(table int) error {
	a, g := &im.allocator, &im.geo
	a.mu.Lock()
	old, oldOff := a.table(), a.reftableOff
	a.mu.Unlock()

	entries := int64(max(table+2, min(len(old)+len(old)/2, maxReftableBytes/entryBytes)))
	clusters := g.clusters(entries * entryBytes)
	if clusters*g.clusterSize > maxReftableBytes {
		return fmt.Errorf("%w: the refcount table would pass %d bytes; a larger cluster size avoids it", ErrTooLarge, maxReftableBytes)
	}
	reftable := make([]uint64, clusters*g.clusterSize/entryBytes)
	copy(reftable, old)

	at, err := im.reserveTail(clusters)
	if err != nil {
		return err
	}
	var blocks []hostCluster
	want := []int{table}
	from, _ := g.refblockIndex(at)
	to, _ := g.refblockIndex(at + hostCluster(clusters) - 1)
	for t := from; t <= to; t++ {
		want = append(want, t)
	}
	for len(want) > 0 { // ends: a block counts at least 64 clusters
		t := want[0]
		want = want[1:]
		if t >= len(reftable) {
			return fmt.Errorf("%w: refcount table entry %d of %d", ErrTooLarge, t, len(reftable))
		}
		if reftable[t] != 0 {
			continue
		}
		c, err := im.reserveTail(1)
		if err != nil {
			return err
		}
		reftable[t] = uint64(g.hostOffset(c))
		blocks = append(blocks, c)
		home, _ := g.refblockIndex(c)
		want = append(want, home)
	}
	end := at + hostCluster(clusters)
	for _, c := range blocks {
		end = max(end, c+1)
	}
	if err := im.extendFileLocked(int64(g.hostOffset(end))); err != nil {
		return err
	}
	if err := im.reserveSpace(at, clusters); err != nil {
		return err
	}
	for _, c := range blocks {
		if err := im.reserveSpace(c, 1); err != nil {
			return err
		}
		if err := im.createTable(classRefblock, g.hostOffset(c), 1, nil); err != nil {
			return err
		}
	}
	for _, c := range blocks {
		if err := im.addRefcountsIn(reftable, c, 1, 1); err != nil {
			return err
		}
	}
	if err := im.addRefcountsIn(reftable, at, clusters, 1); err != nil {
		return err
	}
	if err := im.createTable(classReftable, g.hostOffset(at), clusters, reftable); err != nil {
		return err
	}
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	var field [12]byte
	binary.BigEndian.PutUint64(field[0:], uint64(g.hostOffset(at)))
	binary.BigEndian.PutUint32(field[8:], uint32(clusters))
	if err := im.writeHeader(hdrOffRefcountTableOffset, field[:]); err != nil {
		return err
	}
	a.mu.Lock()
	a.reftable.Store(&reftable)
	a.reftableOff = g.hostOffset(at)
	a.mu.Unlock()
	im.hdrMu.Lock() // SetBacking writes all of the header
	im.hdr.refcountTableOffset, im.hdr.refcountTableClusters = g.hostOffset(at), uint32(clusters)
	im.hdrMu.Unlock()
	_ = im.guardTables() // an overlap was refused at open, and alloc makes none
	im.release(g.hostCluster(oldOff), g.clusters(int64(len(old)*entryBytes)), true)
	return nil
}
