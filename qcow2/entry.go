package qcow2

// An l1Entry is an entry of an L1 table.
//
//	Bits   Meaning
//	 0- 8  reserved, 0
//	 9-55  bits 9-55 of the host offset of the L2 table; 0 means unallocated
//	56-62  reserved, 0
//	   63  COPIED: the L2 table's refcount is exactly 1 (active L1 table only)
//
// Spec: qcow2 "L1 table entry".
type l1Entry uint64

// An l2Entry is an entry of an L2 table without subclusters.
//
//	Bits   Meaning
//	 0-61  cluster descriptor
//	   62  COMPRESSED: the descriptor is that of a compressed cluster
//	   63  COPIED: the cluster's refcount is exactly 1 (active L2 tables only)
//
// Standard cluster descriptor:
//
//	    0  ZERO: the cluster reads as zeroes (version 3; reserved in version 2)
//	 1- 8  reserved, 0
//	 9-55  bits 9-55 of the host offset; 0 with COPIED clear means unallocated
//	56-61  reserved, 0
//
// Compressed cluster descriptor, with x = 62 - (clusterBits - 8):
//
//	0-x-1 host offset, not aligned
//	x-61  number of additional 512-byte sectors that the data touches
//
// Spec: qcow2 "L2 table entry", "Standard Cluster Descriptor", "Compressed Clusters Descriptor".
type l2Entry uint64

const (
	entryCopied     = uint64(1) << 63
	entryCompressed = uint64(1) << 62
	entryZero       = uint64(1)
	entryOffsetMask = uint64(0x00fffffffffffe00) // bits 9-55
	l1ReservedMask  = ^(entryOffsetMask | entryCopied)
	l2ReservedMask  = ^(entryOffsetMask | entryCopied | entryCompressed | entryZero)
	refReservedMask = uint64(0x1ff) // bits 0-8 of a refcount table entry
)

func makeL1(off HostOffset, copied bool) l1Entry {
	e := uint64(off)
	if copied {
		e |= entryCopied
	}
	return l1Entry(e)
}

func (e l1Entry) offset() HostOffset { return HostOffset(uint64(e) & entryOffsetMask) }
func (e l1Entry) copied() bool       { return uint64(e)&entryCopied != 0 }
func (e l1Entry) reserved() uint64   { return uint64(e) & l1ReservedMask }

func makeL2(off HostOffset, copied, zero bool) l2Entry {
	e := uint64(off)
	if copied {
		e |= entryCopied
	}
	if zero {
		e |= entryZero
	}
	return l2Entry(e)
}

func (e l2Entry) offset() HostOffset { return HostOffset(uint64(e) & entryOffsetMask) }
func (e l2Entry) copied() bool       { return uint64(e)&entryCopied != 0 }
func (e l2Entry) compressed() bool   { return uint64(e)&entryCompressed != 0 }
func (e l2Entry) zero() bool         { return uint64(e)&entryZero != 0 }

// reserved returns the reserved bits that are set; e must not be compressed.
func (e l2Entry) reserved() uint64 { return uint64(e) & l2ReservedMask }

// compressedBits returns how many bits the entry of a compressed cluster has for
// its host offset: as few as 49 with the largest clusters.
func (g *geometry) compressedBits() uint { return 62 - (g.clusterBits - 8) }

// packable reports whether the entry of a compressed cluster can name off.
func (g *geometry) packable(off HostOffset) bool { return off>>g.compressedBits() == 0 }

// compressedRange returns where the compressed data of e lies: [off, off+n),
// n a multiple of 512 less the part of the first sector before off.
func (e l2Entry) compressedRange(g *geometry) (off HostOffset, n int64) {
	shift := g.compressedBits()
	off = HostOffset(uint64(e) & (1<<shift - 1))
	sectors := int64(uint64(e)&(entryCompressed-1)>>shift) + 1
	return off, sectors*512 - int64(off&511)
}

// makeCompressed returns the entry for n > 0 bytes of compressed data at off, which
// must be packable.
func makeCompressed(g *geometry, off HostOffset, n int64) l2Entry {
	shift := g.compressedBits()
	sectors := (uint64(off)+uint64(n)-1)>>9 - uint64(off)>>9
	return l2Entry(entryCompressed | sectors<<shift | uint64(off))
}

// A clusterKind says how a guest cluster is stored.
type clusterKind uint8

const (
	kindUnallocated   clusterKind = iota // read from the backing file, or zeroes
	kindNormal                           // data at the host offset
	kindZero                             // zeroes, no host cluster
	kindZeroAllocated                    // zeroes, a host cluster is kept
	kindCompressed
)

// kind classifies e. It does not validate.
func (e l2Entry) kind() clusterKind {
	switch {
	case e.compressed():
		return kindCompressed
	case e.zero() && e.offset() != 0:
		return kindZeroAllocated
	case e.zero():
		return kindZero
	case e.offset() != 0:
		return kindNormal
	}
	return kindUnallocated
}
