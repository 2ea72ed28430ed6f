package qcow2

// checkOverlaps reports metadata that something else refers to as well, where
// the refcounts agree with the references and so do not tell.
func (c *checker) checkOverlaps() error {
	if !c.overlaps {
		return nil
	}
	return c.counts.each(0, c.fileClusters, func(k hostCluster, v counter) error {
		if !c.counts.shared(k, v) || c.sharedBlocks[k] {
			return nil
		}
		stored, ok, err := c.stored(k)
		if err == nil && ok && stored == c.counts.count(k, v) {
			c.problem(false, c.g.hostOffset(k), "ERROR cluster %d is metadata and something else", uint64(k))
		}
		return err
	})
}

// onlyTable reports whether the cluster at off, which an L1 entry names, is an
// L2 table of this file and nothing else.
func (c *checker) onlyTable(off HostOffset) bool {
	return c.g.aligned(off) && int64(off)+c.g.clusterSize <= c.fileBytes &&
		c.counts.get(c.g.hostCluster(off))&(seenMeta|seenData) == 0
}
