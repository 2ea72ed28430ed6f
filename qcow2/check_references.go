package qcow2

import "encoding/binary"

// countAll counts the references to all host clusters.
func (c *checker) countAll() error {
	c.addTable(0, c.g.clusterSize)
	total := float64(len(c.l1))
	for i := range c.snapshots {
		total += float64(c.snapshots[i].l1Size)
	}
	done := 0.0
	step := func() {
		done++
		c.progress(0.8 * done / total)
	}
	if err := c.countL1(c.h.l1Offset, c.h.l1Size, c.l1, true, step); err != nil {
		return err
	}
	for i := range c.snapshots {
		if err := c.countSnapshot(&c.snapshots[i], step); err != nil {
			return err
		}
	}
	c.addTable(c.h.snapshotsOffset, c.snapshotBytes)
	if err := c.countBitmaps(); err != nil {
		return err
	}
	c.countRefcountStructure()
	return nil
}

// addTable counts a structure that nothing else may share.
func (c *checker) addTable(off HostOffset, bytes int64) {
	if bytes > 0 {
		c.addRange(off, bytes, seenMeta)
	}
}

// addRange counts a reference to each cluster that [off, off+bytes) touches.
// It reports false if the range is not in the file and was not counted; the
// last cluster of the file need not be whole.
func (c *checker) addRange(off HostOffset, bytes int64, flags counter) bool {
	if int64(off)+bytes-c.fileBytes >= c.g.clusterSize {
		c.problem(false, off, "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset %#x size %#x",
			uint64(off), bytes)
		c.beyond = min(c.beyond, c.g.hostCluster(off)) // the repair puts nothing there
		return false
	}
	last := c.g.hostCluster(off + HostOffset(bytes-1))
	for k := c.g.hostCluster(off); k <= last; k++ {
		c.fileClusters = max(c.fileClusters, k+1)
		if !c.counts.add(k, flags) {
			c.overflow(k)
		} else if c.inStructure {
			c.structure = append(c.structure, k)
		}
	}
	return true
}

// overflow reports that k has more references than the image can count.
func (c *checker) overflow(k hostCluster) {
	off := c.g.hostOffset(k)
	c.problem(false, off, "ERROR: overflow cluster offset=%#x", uint64(off))
	c.report(Problem{Off: off}, "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing")
}

// countL1 counts an L1 table of size entries, of which l1 are in the file, its
// L2 tables and all that they map. active says that it is the image's own one,
// not that of a snapshot.
func (c *checker) countL1(off HostOffset, size uint32, l1 []uint64, active bool, step func()) error {
	c.addTable(off, int64(size)*entryBytes)
	var offs []HostOffset
	var indexes []int32
	for i, e := range l1 {
		if e != 0 {
			offs = append(offs, l1Entry(e).offset())
			indexes = append(indexes, int32(i))
		}
	}
	return c.readTables("L2 table", offs, func(i int, b []byte) error {
		c.countL1Entry(l1Entry(l1[indexes[i]]), off+HostOffset(indexes[i])*entryBytes, active)
		c.countL2(offs[i], b, active)
		step()
		return nil
	})
}

// countL1Entry counts the L2 table of the entry e at off.
func (c *checker) countL1Entry(e l1Entry, off HostOffset, active bool) {
	if e.reserved() != 0 {
		c.problem(false, off, "ERROR found L1 entry with reserved bits set: %x", uint64(e))
	}
	l2 := e.offset()
	if !c.addRange(l2, c.g.clusterSize, seenTable) {
		c.copiedWrong = c.copiedWrong || active
	} else if active && l2 != 0 {
		c.seeCopied(l2, e.copied())
	}
	if !c.g.aligned(l2) {
		c.problem(false, off, "ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", uint64(l2))
	}
}

// seeCopied remembers the COPIED flag of an active entry that points to off.
func (c *checker) seeCopied(off HostOffset, copied bool) {
	flag := seenPlain
	if copied {
		flag = seenCopied
	}
	*c.counts.slot(c.g.hostCluster(off)) |= flag
}

// countL2 counts what the L2 table b at off maps.
func (c *checker) countL2(off HostOffset, b []byte, active bool) {
	var next HostOffset // the end of the previous cluster, 0 at the beginning
	size := HostOffset(c.g.clusterSize)
	whole := HostOffset(max(0, c.fileBytes-c.g.clusterSize)) // clusters up to here are whole
	for i := 0; i < len(b); i += entryBytes {
		e := l2Entry(binary.BigEndian.Uint64(b[i:]))
		if e == 0 {
			continue
		}
		data := e.offset()
		// The common case first: a sound entry for one whole cluster.
		if e.kind() == kindNormal && e.reserved() == 0 && c.g.aligned(data) && data <= whole {
			flags := seenData
			if active {
				c.res.AllocatedClusters++
				if next != 0 && data != next {
					c.res.FragmentedClusters++
				}
				next = data + size
				flags |= seenPlain
				if e.copied() {
					flags ^= seenPlain | seenCopied
				}
			}
			if !c.counts.add(c.g.hostCluster(data), flags) {
				c.overflow(c.g.hostCluster(data))
			}
			continue
		}
		c.countL2Entry(e, off+HostOffset(i), active, &next)
	}
}

// countL2Entry counts what the entry e at off maps.
func (c *checker) countL2Entry(e l2Entry, off HostOffset, active bool, next *HostOffset) {
	kind := e.kind()
	if kind != kindCompressed && e.reserved() != 0 {
		c.problem(false, off, "ERROR found l2 entry with reserved bits set: %x", uint64(e))
	}
	switch kind {
	case kindCompressed:
		at, n := e.compressedRange(&c.g)
		if e.copied() {
			c.problem(false, off, "ERROR: coffset=%#x: copied flag must never be set for compressed clusters", uint64(at))
		}
		c.addRange(at, n, seenData)
		if active {
			// QEMU: compressed clusters are fragmented by nature.
			c.res.AllocatedClusters++
			c.res.CompressedClusters++
			c.res.FragmentedClusters++
		}
	case kindNormal, kindZeroAllocated:
		data := e.offset()
		if c.zeroed[off] {
			return // seen before, by another L1 table: it will be a zero entry
		}
		if !c.g.aligned(data) {
			if c.countUnaligned(e, off) {
				return
			}
		}
		if active {
			c.res.AllocatedClusters++
			if *next != 0 && data != *next {
				c.res.FragmentedClusters++
			}
			*next = data + HostOffset(c.g.clusterSize)
		}
		if !c.addRange(data, c.g.clusterSize, seenData) {
			c.copiedWrong = c.copiedWrong || active
		} else if active {
			c.seeCopied(data, e.copied())
		}
	}
}

// countUnaligned reports the entry e at off, whose cluster is not aligned. It
// reports whether the repair will make it a zero entry: only if it reads as
// zeroes already.
func (c *checker) countUnaligned(e l2Entry, off HostOffset) bool {
	switch {
	case !e.zero():
		c.problem(false, off, "ERROR offset=%x: Data cluster is not properly aligned; L2 entry corrupted.", uint64(e.offset()))
		return false
	case !c.o.RepairAll:
		c.problem(false, off, "ERROR offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", uint64(e.offset()))
		return false
	}
	c.fixed(false, off, "Repairing offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", uint64(e.offset()))
	c.zeroed[off] = true
	return true
}
