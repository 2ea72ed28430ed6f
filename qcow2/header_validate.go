package qcow2

import "fmt"

// validate checks everything in h that needs no other table.
func (h *header) validate() error {
	if err := h.validateFeatures(); err != nil {
		return err
	}
	g := h.geometry()
	if h.size > maxVirtualSize {
		return corruptf("header", 0, "the virtual size %d is beyond the limit %d", h.size, int64(maxVirtualSize))
	}
	// The order is that of the fields, so that the first fault is named.
	for _, t := range []struct {
		name       string
		off        HostOffset
		bytes, max uint64
		unit       uint64
	}{
		{"L1 table", h.l1Offset, uint64(h.l1Size) * entryBytes, maxL1Bytes, entryBytes},
		{"refcount table", h.refcountTableOffset, uint64(h.refcountTableClusters) * uint64(g.clusterSize), maxReftableBytes, uint64(g.clusterSize)},
		{"snapshot table", h.snapshotsOffset, uint64(h.nbSnapshots) * snapshotFixedBytes, maxSnapshots * snapshotFixedBytes, snapshotFixedBytes},
	} {
		switch {
		case t.bytes > t.max:
			return corruptf(t.name, t.off, "%d entries or clusters in the header, more than the %d that are supported", t.bytes/t.unit, t.max/t.unit)
		case !g.aligned(t.off):
			return corruptf(t.name, t.off, "the offset in the header is not a multiple of the cluster size %d", g.clusterSize)
		case t.off >= maxHostOffset:
			return corruptf(t.name, t.off, "the offset in the header is beyond 2^56")
		}
	}
	if need := g.l1EntriesFor(int64(h.size)); need > int64(h.l1Size) {
		return corruptf("L1 table", h.l1Offset, "%d entries are too few for the virtual size %d: %d are needed", h.l1Size, h.size, need)
	}
	return nil
}

// validateFeatures refuses what this package cannot handle.
func (h *header) validateFeatures() error {
	if h.cryptMethod != 0 {
		return fmt.Errorf("%w: the image is encrypted (crypt_method %d)", ErrUnsupported, h.cryptMethod)
	}
	if unknown := h.incompatible &^ incompatSupported; unknown != 0 {
		return fmt.Errorf("%w: incompatible feature %s", ErrUnsupported,
			describeFeatures(featureIncompatible, unknown, decodeFeatureNames(h.extension(extFeatureNames))))
	}
	switch h.compressionType {
	case compressionZlib, compressionZstd:
	default:
		return fmt.Errorf("%w: compression type %d; zlib (0) and zstd (1) can be read", ErrUnsupported, h.compressionType)
	}
	if marked := h.incompatible&incompatCompression != 0; marked != (h.compressionType != compressionZlib) {
		return corruptf("header", 0, "compression type %d contradicts incompatible feature bit 3 (%t)", h.compressionType, marked)
	}
	return nil
}
