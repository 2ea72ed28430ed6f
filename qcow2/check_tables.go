package qcow2

import "math"

// loadSnapshots reads the snapshot table and reports what is wrong with it.
func (c *checker) loadSnapshots() ([]snapshotRecord, error) {
	records, bytes, err := readSnapshotTableSize(c.f, c.h)
	c.snapshotBytes = bytes
	if err != nil {
		c.report(Problem{Off: c.h.snapshotsOffset}, "ERROR failed to read the snapshot table: %v", err)
		return nil, err
	}
	if c.h.version >= 3 {
		for i := range records {
			if records[i].incomplete {
				c.problem(false, c.h.snapshotsOffset, "ERROR snapshot table entry %d is incomplete", i)
			}
		}
	}
	return records, nil
}

// countSnapshot counts what the snapshot s refers to.
func (c *checker) countSnapshot(s *snapshotRecord, step func()) error {
	switch {
	case !c.g.aligned(s.l1Offset):
		c.problem(false, s.l1Offset, "ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted",
			s.id, s.name, uint64(s.l1Offset))
		return nil
	case s.l1Offset > math.MaxInt64-maxL1Bytes:
		c.problem(false, s.l1Offset, "ERROR snapshot %s (%s) l1_offset=%#x: L1 table is outside image; snapshot table entry corrupted",
			s.id, s.name, uint64(s.l1Offset))
		return nil
	case int64(s.l1Size)*entryBytes > maxL1Bytes:
		c.problem(false, s.l1Offset, "ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted",
			s.id, s.name, s.l1Size)
		return nil
	}
	l1, err := c.readEntries(s.l1Offset, int64(s.l1Size))
	if err != nil {
		return err
	}
	return c.countL1(s.l1Offset, s.l1Size, l1, false, step)
}

// countRefcountStructure counts the refcount table and its blocks. It comes
// last: a rebuild takes these references back, and only these.
func (c *checker) countRefcountStructure() {
	before := c.res.Corruptions
	c.inStructure = true
	defer func() {
		c.inStructure = false
		c.structural = c.res.Corruptions - before
	}()
	c.addTable(c.h.refcountTableOffset, int64(c.h.refcountTableClusters)*c.g.clusterSize)
	for i := range hostCluster(c.h.refcountTableClusters) {
		if c.counts.references(c.g.hostCluster(c.h.refcountTableOffset)+i) > 1 {
			c.broken = true // qemu-img raises the refcount and goes on writing there
		}
	}
	for i, e := range c.reftable {
		off := refblockOffset(e)
		switch {
		case e&refReservedMask != 0:
			c.problem(false, off, "ERROR refcount table entry %d has reserved bits set", i)
			c.rebuild, c.broken = true, true
		case !c.g.aligned(off):
			c.problem(false, off, "ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
			c.rebuild, c.broken = true, true
		case c.g.hostCluster(off) >= c.fileClusters:
			c.problem(false, off, "ERROR refcount block %d is outside image", i)
			c.broken = true
		case off != 0:
			c.addTable(off, c.g.clusterSize)
			if n := c.counts.references(c.g.hostCluster(off)); n != 1 {
				c.sharedBlocks[c.g.hostCluster(off)] = true
				c.problem(false, off, "ERROR refcount block %d refcount=%d", i, n)
				c.rebuild, c.broken = true, true
			}
		}
	}
}
