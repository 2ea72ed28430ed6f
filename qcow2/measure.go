package qcow2

// Measure returns the bytes a new image needs for a disk of virtualSize bytes
// of which allocated bytes (whole clusters) hold data, and those it needs when
// every cluster is allocated, as `qemu-img measure` reckons: required counts
// the metadata of the fully allocated image, so it may be a little too high.
//
// o must be valid for Create; of it the cluster size, the refcount width and
// the preallocation matter.
func Measure(virtualSize int64, allocated int64, o CreateOptions) (required, fullyAllocated int64) {
	o = o.withDefaults()
	h := o.header(virtualSize)
	g := h.geometry()
	size := g.roundUp(virtualSize)
	l2Bytes := g.l1EntriesFor(size) * g.clusterSize
	l1Bytes := g.roundUp(g.l1EntriesFor(size) * entryBytes)
	meta := g.clusterSize + l2Bytes + l1Bytes
	table, blocks := refcountClusters(&g, g.clusters(meta+size))
	meta += (table + blocks) * g.clusterSize
	if o.Preallocation == PreallocationFalloc || o.Preallocation == PreallocationFull {
		allocated = size
	}
	return meta + allocated, meta + size
}
