package qcow2

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// A newStructure is a refcount structure to be written: blocks, then the
// table, from cluster first on, behind everything that is referenced.
type newStructure struct {
	first   hostCluster
	blocks  []int // refcount table indexes, ascending
	table   hostCluster
	entries int64 // of the table, whole clusters
	end     hostCluster
}

// rebuildRefcounts writes a new refcount structure, which counts exactly the
// references that were found, and switches the header to it. The old
// structure is free afterwards.
func (c *checker) rebuildRefcounts() error {
	c.report(Problem{}, "Rebuilding refcount structure")
	for _, k := range c.structure {
		c.counts.sub(k)
	}
	c.structure = nil
	s, err := c.planStructure()
	if err != nil {
		return err
	}
	for k := s.first; k < s.end; k++ {
		c.counts.add(k, seenMeta)
	}
	// The file ends after the structure: the last block may lie beyond its end.
	if n := int64(c.g.hostOffset(s.end)); n > c.fileBytes {
		if err := c.f.Truncate(n); err != nil {
			return err
		}
		c.fileBytes = n
	}
	c.fileClusters = max(c.fileClusters, s.end)
	table := make([]uint64, s.entries)
	for i, index := range s.blocks {
		table[index] = uint64(c.g.hostOffset(s.first + hostCluster(i)))
	}
	if err := c.writeBlocks(s); err != nil {
		return err
	}
	if err := writeEntries(c.f, c.g.hostOffset(s.table), table); err != nil {
		return err
	}
	if err := c.f.Datasync(); err != nil {
		return err
	}

	var b [12]byte // refcount_table_offset and refcount_table_clusters
	clusters := uint32(s.entries >> (c.g.clusterBits - entryBits))
	binary.BigEndian.PutUint64(b[:], uint64(c.g.hostOffset(s.table)))
	binary.BigEndian.PutUint32(b[8:], clusters)
	if _, err := c.f.WriteAt(b[:], hdrOffRefcountTableOffset); err != nil {
		return err
	}
	if err := c.f.Datasync(); err != nil {
		return err
	}
	c.h.refcountTableOffset, c.h.refcountTableClusters = c.g.hostOffset(s.table), clusters
	c.reftable, c.blocks = table, blockCache{}
	clear(c.sharedBlocks)
	return c.verifyRebuilt()
}

// planStructure places the new structure.
func (c *checker) planStructure() (*newStructure, error) {
	var needed []int // refcount table indexes of all counted clusters
	highest := hostCluster(0)
	err := c.counts.each(0, c.fileClusters, func(k hostCluster, v counter) error {
		if c.counts.count(k, v) == 0 {
			return nil
		}
		highest = k
		if table, _ := c.g.refblockIndex(k); len(needed) == 0 || needed[len(needed)-1] != table {
			needed = append(needed, table)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// Behind the old structure too: it is in use until the header is switched.
	s := &newStructure{first: max(highest, c.counts.highest()) + 1}
	for end := s.first; s.end < end || s.end == 0; {
		s.end = end
		from, _ := c.g.refblockIndex(s.first)
		last, _ := c.g.refblockIndex(end)
		s.entries = c.g.roundUp(int64(last+1)*entryBytes) / entryBytes
		if s.entries > maxReftableBytes/entryBytes {
			return nil, fmt.Errorf("%w: the refcounts of cluster %d need a refcount table of %d bytes, more than %d; copy the image",
				ErrTooLarge, uint64(highest), s.entries*entryBytes, maxReftableBytes)
		}
		s.blocks = slices.Clone(needed)
		for i := from; i <= last; i++ {
			if n := len(s.blocks); n == 0 || s.blocks[n-1] < i {
				s.blocks = append(s.blocks, i)
			}
		}
		s.table = s.first + hostCluster(len(s.blocks))
		end = s.table + hostCluster(c.g.clusters(s.entries*entryBytes))
	}
	return s, c.checkUnused(s.end)
}

// checkUnused refuses to write the clusters up to end, the first of which follows
// the last with a reference that was counted, if one has a reference that goes
// beyond the end of the file.
func (c *checker) checkUnused(end hostCluster) error {
	if c.beyond < end {
		return corruptf("L2 table", c.g.hostOffset(c.beyond),
			"an entry refers to this place beyond the end of the file, where the repair would write; copy the image")
	}
	return nil
}

// writeBlocks writes the refcount blocks of s from the counts.
func (c *checker) writeBlocks(s *newStructure) error {
	perBlock := 1 << (c.g.clusterBits - entryBits) // words
	words := int64(len(s.blocks)) * int64(perBlock)
	return writeWords(c.ctx, c.f, int64(c.g.hostOffset(s.first)), words, func(i int64) (w uint64) {
		index := s.blocks[i/int64(perBlock)]
		perWord := 64 / int(c.g.refcountBits)
		first := c.firstOfBlock(index) + hostCluster(int(i%int64(perBlock))*perWord)
		for j := range perWord {
			k := first + hostCluster(j)
			if n := c.counts.references(k); n > 0 {
				_, shift := c.g.refcountWord(j)
				w = c.g.setRefcount(w, shift, n)
			}
		}
		return w
	})
}

// verifyRebuilt takes what was wrong with the refcounts for repaired, and
// compares again.
func (c *checker) verifyRebuilt() error {
	c.res.Corruptions -= c.structural + c.tooLow
	c.res.CorruptionsFixed += c.structural + c.tooLow
	c.res.Leaks -= c.tooHigh
	c.res.LeaksFixed += c.tooHigh
	c.res.CheckErrors -= c.unreadable
	c.structural, c.tooLow, c.tooHigh, c.unreadable = 0, 0, 0, 0
	c.rebuild, c.broken = false, false
	return c.compare()
}
