package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A header is the decoded header cluster: fixed fields, extensions and the
// name of the backing file. All integers are big endian.
//
//	Offset  Size  Field                    Meaning
//	     0     4  magic                    "QFI\xfb"
//	     4     4  version                  2 or 3
//	     8     8  backing_file_offset      host offset of the name; 0 means none
//	    16     4  backing_file_size        length of the name; at most 1023 bytes
//	    20     4  cluster_bits             log2 of the cluster size; 9 to 21
//	    24     8  size                     virtual size in bytes
//	    32     4  crypt_method             0 means not encrypted
//	    36     4  l1_size                  entries of the active L1 table
//	    40     8  l1_table_offset          host offset, cluster aligned
//	    48     8  refcount_table_offset    host offset, cluster aligned
//	    56     4  refcount_table_clusters  clusters of the refcount table
//	    60     4  nb_snapshots             internal snapshots
//	    64     8  snapshots_offset         host offset of the snapshot table, cluster aligned
//	                                       (version 2 ends here)
//	    72     8  incompatible_features    bits, see feature.go
//	    80     8  compatible_features      bits
//	    88     8  autoclear_features       bits
//	    96     4  refcount_order           log2 of the refcount width in bits; at most 6
//	   100     4  header_length            bytes; 104 or more, a multiple of 8
//	   104     1  compression_type         0 zlib, 1 zstd; only if header_length > 104
//	   105     7  padding                  0
//
// The bytes from 105 to header_length are kept as they are, and so are
// extensions that this package does not know.
//
// Spec: qcow2 "Header", "Header extensions".
type header struct {
	version               uint32
	backingOffset         uint64
	backingSize           uint32 // bytes
	clusterBits           uint
	size                  uint64 // virtual size, bytes
	cryptMethod           uint32
	l1Size                uint32 // entries
	l1Offset              HostOffset
	refcountTableOffset   HostOffset
	refcountTableClusters uint32
	nbSnapshots           uint32
	snapshotsOffset       HostOffset
	incompatible          uint64
	compatible            uint64
	autoclear             uint64
	refcountOrder         uint
	headerLength          uint32 // bytes; 72 in version 2
	compressionType       uint8
	tail                  []byte // the header's bytes from 105 to headerLength

	backingName   string
	backingFormat string            // "" if not recorded
	extensions    []headerExtension // in order; without the backing format
}

const (
	headerMagic = "QFI\xfb"

	headerBytesV2      = 72
	headerBytesV3      = 104 // what version 3 must have
	headerBytesV3Known = 112 // what this package writes

	compressionZlib = uint8(0)
	compressionZstd = uint8(1)
)

// Offsets of the fields that are changed in place. Neighbours that change
// together are written with one write: l1_size with l1_table_offset,
// refcount_table_offset with refcount_table_clusters, nb_snapshots with
// snapshots_offset: 12 bytes each, inside one sector.
const (
	hdrOffBackingFile           = 8
	hdrOffSize                  = 24
	hdrOffL1Size                = 36
	hdrOffL1Offset              = 40
	hdrOffRefcountTableOffset   = 48
	hdrOffRefcountTableClusters = 56
	hdrOffNbSnapshots           = 60
	hdrOffSnapshotsOffset       = 64
	hdrOffIncompatible          = 72
	hdrOffAutoclear             = 88
)

// readHeader reads and validates the header of f: everything that needs no
// other table. It reads at most one cluster and refuses what this package
// cannot handle. The corrupt bit is not refused: that is up to the caller.
//
// Errors: ErrNotQcow2, ErrUnsupported, *FormatError, and those of f.
func readHeader(f File) (*header, error) {
	var fixed [headerBytesV3Known]byte
	n, err := f.ReadAt(fixed[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("qcow2: header: %w", err)
	}
	if n < len(headerMagic) || string(fixed[:4]) != headerMagic {
		return nil, ErrNotQcow2
	}
	h, err := decodeHeader(fixed[:])
	if err != nil {
		return nil, err
	}
	if n < int(min(h.headerLength, headerBytesV3Known)) {
		return nil, corruptf("header", 0, "the file ends inside it, after %d bytes", n)
	}
	cluster := make([]byte, 1<<h.clusterBits) // zeroes where the file is shorter
	if _, err := f.ReadAt(cluster, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("qcow2: header: %w", err)
	}
	if err := h.decodeRest(cluster); err != nil {
		return nil, err
	}
	return h, h.validate()
}

// decodeHeader decodes the fixed part of the header from b, which holds
// headerBytesV3Known bytes that begin with the magic. It checks only what
// decoding the rest of the header cluster needs.
func decodeHeader(b []byte) (*header, error) {
	be := binary.BigEndian
	h := &header{
		version:               be.Uint32(b[4:]),
		backingOffset:         be.Uint64(b[8:]),
		backingSize:           be.Uint32(b[16:]),
		size:                  be.Uint64(b[hdrOffSize:]),
		cryptMethod:           be.Uint32(b[32:]),
		l1Size:                be.Uint32(b[hdrOffL1Size:]),
		l1Offset:              HostOffset(be.Uint64(b[hdrOffL1Offset:])),
		refcountTableOffset:   HostOffset(be.Uint64(b[hdrOffRefcountTableOffset:])),
		refcountTableClusters: be.Uint32(b[hdrOffRefcountTableClusters:]),
		nbSnapshots:           be.Uint32(b[hdrOffNbSnapshots:]),
		snapshotsOffset:       HostOffset(be.Uint64(b[hdrOffSnapshotsOffset:])),
		refcountOrder:         defaultRefcountOrder,
		headerLength:          headerBytesV2,
	}
	if h.version != 2 && h.version != 3 {
		return nil, fmt.Errorf("%w: header version %d; versions 2 and 3 can be read", ErrUnsupported, h.version)
	}
	bits := be.Uint32(b[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, corruptf("header", 0, "cluster_bits is %d, not %d to %d", bits, minClusterBits, maxClusterBits)
	}
	h.clusterBits = uint(bits)
	if h.version == 2 {
		return h, nil
	}
	h.incompatible = be.Uint64(b[hdrOffIncompatible:])
	h.compatible = be.Uint64(b[80:])
	h.autoclear = be.Uint64(b[hdrOffAutoclear:])
	h.headerLength = be.Uint32(b[100:])
	order := be.Uint32(b[96:])
	if order > maxRefcountOrder {
		return nil, corruptf("header", 0, "refcount_order is %d, more than %d", order, maxRefcountOrder)
	}
	h.refcountOrder = uint(order)
	if h.headerLength < headerBytesV3 || h.headerLength%8 != 0 || h.headerLength > 1<<h.clusterBits {
		return nil, corruptf("header", 0, "header_length is %d, not a multiple of 8 from %d to the cluster size %d",
			h.headerLength, headerBytesV3, 1<<h.clusterBits)
	}
	if h.headerLength > headerBytesV3 {
		h.compressionType = b[104]
	}
	return h, nil
}

// decodeRest decodes what follows the fixed part in the header cluster.
func (h *header) decodeRest(cluster []byte) error {
	if h.headerLength > headerBytesV3 {
		h.tail = append([]byte(nil), cluster[headerBytesV3+1:h.headerLength]...)
	}
	end := uint64(len(cluster))
	if h.backingOffset != 0 {
		switch {
		case h.backingOffset < uint64(h.headerLength) || h.backingOffset > end:
			return corruptf("header", 0, "backing_file_offset %#x is outside the header cluster", h.backingOffset)
		case h.backingSize > maxBackingName || uint64(h.backingSize) > end-h.backingOffset:
			return corruptf("header", 0, "the backing file name is %d bytes long; %d fit", h.backingSize,
				min(maxBackingName, end-h.backingOffset))
		}
		end = h.backingOffset
		h.backingName = string(cluster[end:][:h.backingSize])
	}
	return h.decodeExtensions(cluster[:end])
}

// encodeCluster returns the whole header cluster. It places the backing file
// name and sets backingOffset and backingSize accordingly.
func (h *header) encodeCluster() ([]byte, error) {
	b := make([]byte, 1<<h.clusterBits)
	used, err := h.encodeExtensions(b[h.headerLength:])
	if err != nil {
		return nil, err
	}
	h.backingOffset, h.backingSize = 0, 0
	if h.backingName != "" {
		name := b[int(h.headerLength)+used:]
		if len(h.backingName) > min(maxBackingName, len(name)) {
			return nil, fmt.Errorf("qcow2: backing file name of %d bytes: at most %d fit into the header of this image; use a shorter name",
				len(h.backingName), min(maxBackingName, len(name)))
		}
		h.backingOffset = uint64(h.headerLength) + uint64(used)
		h.backingSize = uint32(copy(name, h.backingName))
	}

	be := binary.BigEndian
	copy(b, headerMagic)
	be.PutUint32(b[4:], h.version)
	be.PutUint64(b[8:], h.backingOffset)
	be.PutUint32(b[16:], h.backingSize)
	be.PutUint32(b[20:], uint32(h.clusterBits))
	be.PutUint64(b[hdrOffSize:], h.size)
	be.PutUint32(b[32:], h.cryptMethod)
	be.PutUint32(b[hdrOffL1Size:], h.l1Size)
	be.PutUint64(b[hdrOffL1Offset:], uint64(h.l1Offset))
	be.PutUint64(b[hdrOffRefcountTableOffset:], uint64(h.refcountTableOffset))
	be.PutUint32(b[hdrOffRefcountTableClusters:], h.refcountTableClusters)
	be.PutUint32(b[hdrOffNbSnapshots:], h.nbSnapshots)
	be.PutUint64(b[hdrOffSnapshotsOffset:], uint64(h.snapshotsOffset))
	if h.version == 2 {
		return b, nil
	}
	be.PutUint64(b[hdrOffIncompatible:], h.incompatible)
	be.PutUint64(b[80:], h.compatible)
	be.PutUint64(b[hdrOffAutoclear:], h.autoclear)
	be.PutUint32(b[96:], uint32(h.refcountOrder))
	be.PutUint32(b[100:], h.headerLength)
	if h.headerLength > headerBytesV3 {
		b[104] = h.compressionType
		copy(b[headerBytesV3+1:h.headerLength], h.tail)
	}
	return b, nil
}

// geometry returns what follows from the cluster size and the refcount width.
func (h *header) geometry() geometry { return newGeometry(h.clusterBits, h.refcountOrder) }

// dirty reports whether refcounts may be stale.
func (h *header) dirty() bool { return h.incompatible&incompatDirty != 0 }

// corrupt reports whether the image was marked corrupt.
func (h *header) corrupt() bool { return h.incompatible&incompatCorrupt != 0 }
