package qcow2

import "encoding/binary"

// checkCopied compares the COPIED flags of the active tables with the stored
// refcounts. A repair of corruptions corrects them; a repair of leaks does so
// if nothing else is wrong, as qemu-img.
func (c *checker) checkCopied() error {
	repair := c.o.RepairAll || c.o.RepairLeaks && c.res.Clean()
	var offs []HostOffset
	var indexes []int
	for i, e := range c.l1 {
		if off := l1Entry(e).offset(); off != 0 {
			offs = append(offs, off)
			indexes = append(indexes, i)
		}
	}
	first, last := len(c.l1), -1 // L1 entries to write
	err := c.readTables("L2 table", offs, func(i int, b []byte) error {
		index := indexes[i]
		wrong, refcount, err := c.copiedWrongFor(offs[i], l1Entry(c.l1[index]).copied())
		if err != nil {
			return err
		}
		if wrong {
			c.copiedProblem(repair, c.h.l1Offset+HostOffset(index)*entryBytes,
				"OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", index, c.l1[index], refcount)
			if repair {
				c.l1[index] ^= entryCopied
				first, last = min(first, index), index
			}
		}
		return c.checkCopiedL2(offs[i], b, repair)
	})
	if err != nil || last < 0 {
		return err
	}
	return writeEntries(c.f, c.h.l1Offset+HostOffset(first)*entryBytes, c.l1[first:last+1])
}

// checkCopiedL2 is checkCopied for the L2 table b at off.
func (c *checker) checkCopiedL2(off HostOffset, b []byte, repair bool) error {
	// The repair leaves a table alone that would not be the only thing it writes.
	repair = repair && c.onlyTable(off)
	dirty := false
	for i := 0; i < len(b); i += entryBytes {
		e := l2Entry(binary.BigEndian.Uint64(b[i:]))
		if kind := e.kind(); kind != kindNormal && kind != kindZeroAllocated {
			continue
		}
		wrong, refcount, err := c.copiedWrongFor(e.offset(), e.copied())
		if err != nil {
			return err
		}
		if !wrong {
			continue
		}
		c.copiedProblem(repair, off+HostOffset(i), "OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", uint64(e), refcount)
		binary.BigEndian.PutUint64(b[i:], uint64(e)^entryCopied)
		dirty = true
	}
	if !dirty || !repair {
		return nil
	}
	_, err := c.f.WriteAt(b, int64(off))
	return err
}

// copiedWrongFor reports whether copied is the wrong flag for the cluster at
// off, and its stored refcount. Where that is not known, no flag is wrong.
func (c *checker) copiedWrongFor(off HostOffset, copied bool) (wrong bool, refcount uint64, err error) {
	refcount, ok, err := c.stored(c.g.hostCluster(off))
	return ok && copied != (refcount == 1), refcount, err
}

func (c *checker) copiedProblem(repair bool, off HostOffset, format string, args ...any) {
	if repair {
		c.fixed(false, off, "Repairing "+format, args...)
	} else {
		c.problem(false, off, "ERROR "+format, args...)
	}
}
