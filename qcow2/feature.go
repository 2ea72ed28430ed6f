package qcow2

import (
	"fmt"
	"strings"
)

// Feature bits of the header.
//
// An unknown incompatible bit forbids opening the image; an unknown compatible
// bit is ignored; an unknown autoclear bit is cleared before the first write.
//
// Spec: qcow2 "Header", incompatible_features to autoclear_features.
const (
	incompatDirty       = uint64(1) << 0 // refcounts may be stale
	incompatCorrupt     = uint64(1) << 1 // a contradiction was seen; read only
	incompatDataFile    = uint64(1) << 2 // guest clusters live in an external data file
	incompatCompression = uint64(1) << 3 // the compression type is not zlib
	incompatExtL2       = uint64(1) << 4 // 16-byte L2 entries with subclusters

	compatLazyRefcounts = uint64(1) << 0

	autoclearBitmaps = uint64(1) << 0 // the bitmaps extension is consistent
	autoclearRawData = uint64(1) << 1 // the external data file is a raw image

	incompatSupported = incompatDirty | incompatCorrupt | incompatCompression
)

// A featureName is an entry of the feature name table.
//
//	Offset  Size  Field  Meaning
//	     0     1  type   0 incompatible, 1 compatible, 2 autoclear
//	     1     1  bit    bit number
//	     2    46  name   padded with zeroes
//
// Spec: qcow2 "Feature name table".
type featureName struct {
	kind featureKind
	bit  uint8
	name string
}

// A featureKind says which of the three feature fields a bit belongs to.
type featureKind uint8

const (
	featureIncompatible featureKind = iota
	featureCompatible
	featureAutoclear
)

const featureNameBytes = 48

// featureNames returns what QEMU writes into new images, in its order.
func featureNames() []featureName {
	return []featureName{
		{featureIncompatible, 0, "dirty bit"},
		{featureIncompatible, 1, "corrupt bit"},
		{featureIncompatible, 2, "external data file"},
		{featureIncompatible, 3, "compression type"},
		{featureIncompatible, 4, "extended L2 entries"},
		{featureCompatible, 0, "lazy refcounts"},
		{featureAutoclear, 0, "bitmaps"},
		{featureAutoclear, 1, "raw external data"},
	}
}

// decodeFeatureNames decodes the content of a feature name table; a rest that
// is no whole entry is ignored.
func decodeFeatureNames(b []byte) []featureName {
	names := make([]featureName, 0, len(b)/featureNameBytes)
	for ; len(b) >= featureNameBytes; b = b[featureNameBytes:] {
		name, _, _ := strings.Cut(string(b[2:featureNameBytes]), "\x00")
		names = append(names, featureName{featureKind(b[0]), b[1], name})
	}
	return names
}

// encodeFeatureNames returns the content of a feature name table.
func encodeFeatureNames(names []featureName) []byte {
	b := make([]byte, len(names)*featureNameBytes)
	for i, n := range names {
		e := b[i*featureNameBytes:][:featureNameBytes]
		e[0], e[1] = byte(n.kind), n.bit
		copy(e[2:], n.name)
	}
	return b
}

// describeFeatures lists the set bits of a feature field for an error message,
// with the names that the image or else this package knows.
func describeFeatures(kind featureKind, bits uint64, image []featureName) string {
	var list []string
	for bit := uint8(0); bit < 64; bit++ {
		if bits&(1<<bit) == 0 {
			continue
		}
		s := fmt.Sprintf("bit %d", bit)
		for _, n := range append(image[:len(image):len(image)], featureNames()...) {
			if n.kind == kind && n.bit == bit && n.name != "" {
				s = fmt.Sprintf("bit %d (%q)", bit, n.name)
				break
			}
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}
