package qcow2

import (
	"encoding/binary"
	"fmt"
)

// A headerExtension is an optional part of the header cluster.
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   type; 0 ends the list
//	     4     4  length  bytes of data, without padding
//	     8     n  data    padded with zeroes to a multiple of 8
//
// Spec: qcow2 "Header extensions".
type headerExtension struct {
	magic uint32
	data  []byte
}

const (
	extEnd           = uint32(0)
	extBackingFormat = uint32(0xe2792aca)
	extFeatureNames  = uint32(0x6803f857)
	extCrypto        = uint32(0x0537be77)
	extBitmaps       = uint32(0x23852875)
	extDataFile      = uint32(0x44415441)

	extHeaderBytes   = 8
	maxBackingFormat = 15 // QEMU: char backing_format[16]
)

// decodeExtensions decodes the extensions in area, the header cluster up to
// the backing file name. The data it keeps are copies.
func (h *header) decodeExtensions(area []byte) error {
	off := int(h.headerLength)
	for off+extHeaderBytes <= len(area) {
		magic := binary.BigEndian.Uint32(area[off:])
		length := binary.BigEndian.Uint32(area[off+4:])
		at := HostOffset(off)
		off += extHeaderBytes
		if uint64(length) > uint64(len(area)-off) {
			return corruptf("header extension", at, "%d bytes long, but only %d are left", length, len(area)-off)
		}
		if magic == extEnd {
			return nil
		}
		data := area[off : off+int(length)]
		off += (int(length) + 7) &^ 7
		if magic != extBackingFormat {
			h.extensions = append(h.extensions, headerExtension{magic, append([]byte(nil), data...)})
			continue
		}
		if len(data) > maxBackingFormat {
			return corruptf("header extension", at, "the backing format is %d bytes long, more than %d", len(data), maxBackingFormat)
		}
		h.backingFormat = string(data)
	}
	return nil
}

// encodeExtensions writes the extensions and their end mark to the beginning
// of area and returns the bytes used.
func (h *header) encodeExtensions(area []byte) (used int, err error) {
	list := h.extensions
	if h.backingFormat != "" {
		list = append([]headerExtension{{extBackingFormat, []byte(h.backingFormat)}}, list...)
	}
	for _, e := range append(list, headerExtension{magic: extEnd}) {
		need := extHeaderBytes + (len(e.data)+7)&^7
		if need > len(area)-used {
			return 0, fmt.Errorf("qcow2: the header extensions do not fit into a cluster of %d bytes; use larger clusters", 1<<h.clusterBits)
		}
		binary.BigEndian.PutUint32(area[used:], e.magic)
		binary.BigEndian.PutUint32(area[used+4:], uint32(len(e.data)))
		copy(area[used+extHeaderBytes:], e.data)
		used += need
	}
	return used, nil
}

// extension returns the data of the first extension of a type, or nil.
func (h *header) extension(magic uint32) []byte {
	for _, e := range h.extensions {
		if e.magic == magic {
			return e.data
		}
	}
	return nil
}
