package qcow2

import (
	"bytes"
	"encoding/binary"
	"math"
)

// compare compares the refcounts that the image stores with the references
// that were counted, for all clusters of the file.
func (c *checker) compare() error {
	return c.eachMismatch(func(k hostCluster, stored, refs uint64) error {
		what := "ERROR"
		if stored > refs {
			what = "Leaked"
			c.tooHigh++
		} else {
			c.tooLow++
		}
		c.rebuild = c.rebuild || stored == 0
		c.problem(stored > refs, c.g.hostOffset(k), "%s cluster %d refcount=%d reference=%d", what, uint64(k), stored, refs)
		return nil
	})
}

// eachMismatch calls fn with each cluster of the file whose stored refcount is
// not the number of references to it, in ascending order. On its way it finds
// the highest cluster in use, and whether a COPIED flag is wrong or metadata
// overlaps.
func (c *checker) eachMismatch(fn func(k hostCluster, stored, refs uint64) error) error {
	c.highest = 0
	c.compareEnd = c.fileClusters
	if c.o.beyondEnd {
		c.compareEnd = max(c.fileClusters, c.coveredEnd())
	}
	var offs []HostOffset
	var tables []int
	next := hostCluster(0) // clusters below it are compared
	for i, e := range c.reftable {
		first := c.firstOfBlock(i)
		if first >= c.compareEnd {
			break
		}
		if off := refblockOffset(e); off != 0 && c.readableBlock(off) {
			offs = append(offs, off)
			tables = append(tables, i)
		}
	}
	err := c.readTables("refcount block", offs, func(i int, b []byte) error {
		first := c.firstOfBlock(tables[i])
		if err := c.compareUncovered(next, first, fn); err != nil {
			return err
		}
		next = c.firstOfBlock(tables[i] + 1)
		c.progress(0.8 + 0.2*float64(i)/float64(len(offs)))
		return c.compareBlock(first, b, fn)
	})
	if err != nil {
		return err
	}
	return c.compareUncovered(next, c.compareEnd, fn)
}

// coveredEnd returns the end of the clusters that have a refcount block.
func (c *checker) coveredEnd() hostCluster {
	for i := len(c.reftable) - 1; i >= 0; i-- {
		if refblockOffset(c.reftable[i]) != 0 {
			return c.firstOfBlock(i + 1)
		}
	}
	return 0
}

// readableBlock reports whether there can be a refcount block at off.
func (c *checker) readableBlock(off HostOffset) bool {
	return c.g.aligned(off) && off <= math.MaxInt64-HostOffset(c.g.clusterSize)
}

// firstOfBlock returns the first cluster that refcount block i counts.
func (c *checker) firstOfBlock(i int) hostCluster { return hostCluster(i) << c.g.refblockBits }

// compareUncovered compares the clusters [from, to), which have no readable
// refcount block: their refcount is 0, or unknown.
func (c *checker) compareUncovered(from, to hostCluster, fn func(k hostCluster, stored, refs uint64) error) error {
	for i := from; i < to; {
		table, _ := c.g.refblockIndex(i)
		if table >= len(c.reftable) {
			return c.compareAbsent(i, to, fn)
		}
		end := min(to, c.firstOfBlock(table+1))
		if !c.readableBlock(refblockOffset(c.reftable[table])) {
			n := int(min(int64(end-i), math.MaxInt32))
			c.unreadable += n
			c.res.CheckErrors += n
			c.report(Problem{Off: c.g.hostOffset(i)}, "Can't get refcount for clusters %d to %d: the offset of refcount block %d is invalid", uint64(i), uint64(end-1), table)
		} else if err := c.compareAbsent(i, end, fn); err != nil {
			return err
		}
		i = end
	}
	return nil
}

// compareAbsent compares the clusters [from, to), whose refcounts are all 0.
func (c *checker) compareAbsent(from, to hostCluster, fn func(k hostCluster, stored, refs uint64) error) error {
	return c.counts.each(from, to, func(k hostCluster, v counter) error {
		return c.compareCluster(k, 0, v, fn)
	})
}

// compareBlock compares the clusters from first on with the refcount block b.
func (c *checker) compareBlock(first hostCluster, b []byte, fn func(k hostCluster, stored, refs uint64) error) error {
	end := min(c.compareEnd, first+1<<c.g.refblockBits)
	for from := first; from < end; {
		to := min(end, (from|(chunkClusters-1))+1) // one chunk of counters at a time
		part := b[int64(from-first)<<c.g.refcountOrder/8:][:(int64(to-from)<<c.g.refcountOrder+7)/8]
		if err := c.compareChunk(from, to, part, fn); err != nil {
			return err
		}
		from = to
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// compareChunk compares the clusters [from, to), which share a chunk of
// counters, with the refcounts in b.
func (c *checker) compareChunk(from, to hostCluster, b []byte, fn func(k hostCluster, stored, refs uint64) error) error {
	ch := c.counts.chunk(uint64(from) >> chunkBits)
	if ch == nil && len(bytes.TrimLeft(b, "\x00")) == 0 {
		return nil
	}
	for k, i := from, 0; k < to; i++ {
		word := loadWord(b, i)
		for _, shift := range c.shifts[:min(len(c.shifts), int(to-k))] {
			stored := c.g.getRefcount(word, shift)
			var v counter
			if ch != nil {
				v = ch.get(int(k % chunkClusters))
			}
			k++
			switch {
			case stored == 0 && v == 0:
			case stored == 1 && (v == 1|seenCopied|seenData || v == 1|seenMeta): // the common case
				c.highest = k - 1
			default:
				if err := c.compareCluster(k-1, stored, v, fn); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// loadWord returns word i of b, which may end inside it.
func loadWord(b []byte, i int) uint64 {
	if b = b[i*8:]; len(b) >= 8 {
		return binary.BigEndian.Uint64(b)
	}
	var whole [8]byte
	copy(whole[:], b)
	return binary.BigEndian.Uint64(whole[:])
}

// compareCluster compares the stored refcount of k with its counter v.
func (c *checker) compareCluster(k hostCluster, stored uint64, v counter, fn func(k hostCluster, stored, refs uint64) error) error {
	refs := c.counts.count(k, v)
	if stored > 0 || refs > 0 {
		c.highest = k
	}
	wrong := seenCopied
	if stored == 1 {
		wrong = seenPlain
	}
	if v&wrong != 0 {
		c.copiedWrong = true
	}
	c.overlaps = c.overlaps || c.counts.shared(k, v)
	if stored != refs {
		return fn(k, stored, refs)
	}
	return nil
}
