package qcow2

import "fmt"

// A layout places the structures of a new image, one after another: header,
// refcount table, refcount blocks, L1 table, L2 tables, data clusters. Each
// cluster up to end is referenced exactly once.
type layout struct {
	g                geometry
	reftable         hostCluster
	reftableClusters int64
	refblocks        hostCluster
	refblockCount    int64
	l1               hostCluster
	l1Entries        int64
	l2               hostCluster
	l2Count          int64
	data             hostCluster
	dataCount        int64 // from guest offset 0 on
	end              hostCluster
}

// newLayout returns the layout of an image of size bytes, of which the guest
// clusters of the first allocated bytes are allocated.
func newLayout(g geometry, size, allocated int64) (*layout, error) {
	// One L1 entry at least, so that an image of size 0 has a table like any other.
	l := &layout{g: g, reftable: 1, l1Entries: max(1, g.l1EntriesFor(size))}
	if l.l1Entries*entryBytes > maxL1Bytes {
		return nil, fmt.Errorf("%w: %d bytes need an L1 table of %d entries, more than %d; use larger clusters",
			ErrTooLarge, size, l.l1Entries, maxL1Bytes/entryBytes)
	}
	l.l2Count = g.l1EntriesFor(allocated)
	l.dataCount = g.clusters(allocated)
	l1Clusters := g.clusters(l.l1Entries * entryBytes)
	l.reftableClusters, l.refblockCount = refcountClusters(&g, 1+l1Clusters+l.l2Count+l.dataCount)
	l.refblocks = l.reftable + hostCluster(l.reftableClusters)
	l.l1 = l.refblocks + hostCluster(l.refblockCount)
	l.l2 = l.l1 + hostCluster(l1Clusters)
	l.data = l.l2 + hostCluster(l.l2Count)
	l.end = l.data + hostCluster(l.dataCount)
	if l.reftableClusters*g.clusterSize > maxReftableBytes || l.end > g.hostCluster(maxHostOffset) {
		return nil, fmt.Errorf("%w: %d bytes cannot be preallocated with clusters of %d bytes; use larger clusters or no preallocation",
			ErrTooLarge, size, g.clusterSize)
	}
	return l, nil
}

// refcountClusters returns how many clusters the refcount table and the
// refcount blocks take that cover n other clusters and themselves.
func refcountClusters(g *geometry, n int64) (table, blocks int64) {
	for last := int64(-1); last != table+blocks; {
		last = table + blocks
		blocks = (n + last + 1<<g.refblockBits - 1) >> g.refblockBits
		table = g.clusters(blocks * entryBytes)
	}
	return table, blocks
}

// The methods below return word i of a table of the layout: 8 bytes, big endian.

func (l *layout) reftableWord(i int64) uint64 {
	return uint64(l.g.hostOffset(l.refblocks + hostCluster(i)))
}

func (l *layout) l1Word(i int64) uint64 {
	return uint64(makeL1(l.g.hostOffset(l.l2+hostCluster(i)), true))
}

func (l *layout) l2Word(i int64) uint64 {
	return uint64(makeL2(l.g.hostOffset(l.data+hostCluster(i)), true, false))
}

// refcountWord counts 64/refcountBits clusters: each one up to l.end once.
func (l *layout) refcountWord(i int64) (w uint64) {
	first := hostCluster(i * l.refcountsPerWord())
	for j := 0; j < int(l.refcountsPerWord()) && first+hostCluster(j) < l.end; j++ {
		_, shift := l.g.refcountWord(j)
		w = l.g.setRefcount(w, shift, 1)
	}
	return w
}

func (l *layout) refcountsPerWord() int64 { return 64 / int64(l.g.refcountBits) }

// refcountWords returns how many words of the refcount blocks are not 0.
func (l *layout) refcountWords() int64 {
	return (int64(l.end) + l.refcountsPerWord() - 1) / l.refcountsPerWord()
}
