package qcow2

import "encoding/binary"

// repairSnapshotTable writes the snapshot table anew if entries are
// incomplete: in version 3 each must say the virtual size.
func (c *checker) repairSnapshotTable() error {
	incomplete := 0
	for i := range c.snapshots {
		if c.snapshots[i].incomplete {
			incomplete++
		}
	}
	if incomplete == 0 || c.h.version < 3 || !c.o.RepairAll {
		return nil
	}
	table := encodeSnapshotTable(c.snapshots)
	first := c.counts.highest() + 1
	end := first + hostCluster(c.g.clusters(int64(len(table))))
	if err := c.checkUnused(end); err != nil {
		return err
	}
	off := c.g.hostOffset(first)
	if n := int64(c.g.hostOffset(end)); n > c.fileBytes {
		if err := c.f.Truncate(n); err != nil {
			return err
		}
		c.fileBytes = n
	}
	c.addTable(off, int64(len(table)))
	if err := c.quietly(c.repairRefcounts); err != nil {
		return err
	}
	if _, err := c.f.WriteAt(table, int64(off)); err != nil {
		return err
	}
	if err := c.f.Datasync(); err != nil {
		return err
	}
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(off))
	if _, err := c.f.WriteAt(b[:], hdrOffSnapshotsOffset); err != nil {
		return err
	}
	if err := c.f.Datasync(); err != nil {
		return err
	}
	old := c.g.hostCluster(c.h.snapshotsOffset)
	for k := range hostCluster(c.g.clusters(c.snapshotBytes)) {
		c.counts.sub(old + k)
	}
	c.h.snapshotsOffset, c.snapshotBytes = off, int64(len(table))
	for i := range c.snapshots {
		if c.snapshots[i].incomplete {
			c.snapshots[i].incomplete = false
			c.res.Corruptions--
			c.fixed(false, off, "Repairing snapshot table entry %d is incomplete", i)
		}
	}
	return c.quietly(c.repairRefcounts)
}

// quietly calls fn, which changes refcounts that were not wrong: that is no finding.
func (c *checker) quietly(fn func() error) error {
	res, report := c.res, c.o.Report
	c.o.Report = nil
	err := fn()
	c.res, c.o.Report = res, report
	return err
}
