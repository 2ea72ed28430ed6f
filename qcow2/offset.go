package qcow2

// The types of this file keep guest and host addresses apart; its methods are
// the only places of the package that shift and mask them.

// A HostOffset is a byte offset in the image file, below 2^56.
type HostOffset uint64

// A GuestOffset is a byte offset in the virtual disk.
type GuestOffset uint64

// A hostCluster is the index of a cluster in the image file.
type hostCluster uint64

// A guestCluster is the index of a cluster of the virtual disk.
type guestCluster uint64

// Limits of the format, and of QEMU where the format has none.
const (
	minClusterBits       = 9
	maxClusterBits       = 21
	defaultClusterBits   = 16
	maxRefcountOrder     = 6
	defaultRefcountOrder = 4

	maxHostOffset      = HostOffset(1) << 56 // offsets in tables have 56 bits
	maxL1Bytes         = 32 << 20            // QEMU: QCOW_MAX_L1_SIZE
	maxReftableBytes   = 8 << 20             // QEMU: QCOW_MAX_REFTABLE_SIZE
	maxSnapshots       = 65536               // QEMU: QCOW_MAX_SNAPSHOTS
	maxSnapshotTable   = 64 << 20            // QEMU: QCOW_MAX_SNAPSHOTS_SIZE
	maxSnapshotExtra   = 1024                // QEMU: QCOW_MAX_SNAPSHOT_EXTRA_DATA
	maxBackingName     = 1023                // bytes
	maxSliceBytes      = 4096                // unit of the metadata cache
	entryBytes         = 8                   // an L1, L2 or refcount table entry
	entryBits          = 3
	maxVirtualSize     = 1<<63 - 1<<21
	bytesPerL2MaxEntry = 1 << maxClusterBits
)

// geometry holds what follows from the cluster size and refcount order of an
// image. It never changes while an image is open.
type geometry struct {
	clusterBits   uint  // log2 of the cluster size
	clusterSize   int64 // bytes
	l2Bits        uint  // log2 of the entries of an L2 table
	l2Entries     int   // entries of an L2 table
	refcountOrder uint  // log2 of the refcount width in bits
	refcountBits  uint  // width of a refcount
	refblockBits  uint  // log2 of the refcounts of a refcount block
	refcountMax   uint64
	refcountOnes  uint64 // a word whose refcounts are all 1
	sliceBytes    int    // bytes of a cached slice of a table: min(cluster size, 4096)
	sliceBits     uint   // log2 of sliceBytes
}

func newGeometry(clusterBits, refcountOrder uint) geometry {
	g := geometry{
		clusterBits:   clusterBits,
		clusterSize:   1 << clusterBits,
		l2Bits:        clusterBits - entryBits,
		l2Entries:     1 << (clusterBits - entryBits),
		refcountOrder: refcountOrder,
		refcountBits:  1 << refcountOrder,
		refblockBits:  clusterBits + 3 - refcountOrder,
		refcountMax:   ^uint64(0) >> (64 - (1 << refcountOrder)),
		sliceBits:     min(clusterBits, 12),
	}
	g.sliceBytes = 1 << g.sliceBits
	g.refcountOnes = ^uint64(0) / g.refcountMax
	return g
}

func (g *geometry) guestCluster(off GuestOffset) guestCluster {
	return guestCluster(off >> g.clusterBits)
}

func (g *geometry) guestOffset(c guestCluster) GuestOffset {
	return GuestOffset(c) << g.clusterBits
}

func (g *geometry) hostCluster(off HostOffset) hostCluster {
	return hostCluster(off >> g.clusterBits)
}

func (g *geometry) hostOffset(c hostCluster) HostOffset {
	return HostOffset(c) << g.clusterBits
}

// inCluster returns the offset of off inside its cluster.
func (g *geometry) inCluster(off int64) int64 { return off & (g.clusterSize - 1) }

// aligned reports whether off is a multiple of the cluster size.
func (g *geometry) aligned(off HostOffset) bool {
	return off&(HostOffset(g.clusterSize)-1) == 0
}

// roundUp rounds n up to a multiple of the cluster size.
func (g *geometry) roundUp(n int64) int64 { return (n + g.clusterSize - 1) &^ (g.clusterSize - 1) }

// clusters returns how many clusters n bytes fill, rounded up.
func (g *geometry) clusters(n int64) int64 { return (n + g.clusterSize - 1) >> g.clusterBits }

// l1Index returns the index of the L1 entry that maps c.
func (g *geometry) l1Index(c guestCluster) int { return int(c >> g.l2Bits) }

// l2Index returns the index of the L2 entry that maps c, in its L2 table.
func (g *geometry) l2Index(c guestCluster) int { return int(c) & (g.l2Entries - 1) }

// l1EntriesFor returns how many L1 entries a disk of size bytes needs.
func (g *geometry) l1EntriesFor(size int64) int64 {
	bits := g.clusterBits + g.l2Bits
	return int64((uint64(size) + (1 << bits) - 1) >> bits)
}

// slice returns which slice of its table an entry (8 bytes each) lies in, as a
// byte offset from the table's start, and the entry's index inside that slice.
func (g *geometry) slice(entry int) (off int64, index int) {
	perSlice := g.sliceBytes / entryBytes
	return int64(entry/perSlice) * int64(g.sliceBytes), entry % perSlice
}

// sliceNumber returns which slice of the image file lies at off.
func (g *geometry) sliceNumber(off HostOffset) uint64 { return uint64(off >> g.sliceBits) }

// refblockIndex returns the refcount table entry that covers c, and the index
// of c's refcount in that refcount block.
func (g *geometry) refblockIndex(c hostCluster) (table int, index int) {
	return int(c >> g.refblockBits), int(c & (1<<g.refblockBits - 1))
}
