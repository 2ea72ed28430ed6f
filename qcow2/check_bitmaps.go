package qcow2

import (
	"encoding/binary"
	"fmt"
)

// The bitmaps extension leads to a directory of persistent bitmaps.
//
//	Offset  Size  Field                    Meaning
//	     0     4  nb_bitmaps               1 to 65535
//	     4     4  reserved                 0
//	     8     8  bitmap_directory_size    bytes
//	    16     8  bitmap_directory_offset  host offset, cluster aligned
//
// An entry of the directory:
//
//	 0     8  bitmap_table_offset      host offset, cluster aligned
//	 8     4  bitmap_table_size        entries of 8 bytes
//	12     4  flags
//	16     1  type                     1 dirty tracking bitmap
//	17     1  granularity_bits
//	18     2  name_size                bytes
//	20     4  extra_data_size          bytes
//	         extra data, name, padding to a multiple of 8
//
// An entry of a bitmap table has the host offset of a cluster in bits 9-55;
// bit 0 says, without an offset, that the bits are all ones; the others are 0.
//
// Spec: qcow2 "Bitmaps extension", "Bitmaps".
const (
	bitmapExtensionBytes  = 24
	bitmapEntryBytes      = 24
	maxBitmapDirectory    = 64 << 20 // bytes; QEMU: 65535 bitmaps with names of at most 1023 bytes
	maxBitmapTableEntries = 0x8000000
	bitmapEntryReserved   = uint64(0xff000000000001fe)
)

// countBitmaps counts what persistent bitmaps occupy. Without the autoclear
// bit they are not valid, and their clusters are leaks.
func (c *checker) countBitmaps() error {
	ext := c.h.extension(extBitmaps)
	if c.h.autoclear&autoclearBitmaps == 0 || len(ext) != bitmapExtensionBytes {
		return nil
	}
	size := binary.BigEndian.Uint64(ext[8:])
	off := HostOffset(binary.BigEndian.Uint64(ext[16:]))
	if size > maxBitmapDirectory || !c.g.aligned(off) || off >= maxHostOffset {
		c.problem(false, off, "ERROR bitmap directory at %#x of %d bytes: invalid header extension", uint64(off), size)
		return nil
	}
	c.addTable(off, int64(size))
	if int64(off)+int64(size) > c.fileBytes {
		c.problem(false, off, "ERROR bitmap directory at %#x: the file ends inside it", uint64(off))
		return nil
	}
	dir := make([]byte, size)
	if err := readZeroed(c.f, dir, off); err != nil {
		return fmt.Errorf("qcow2: bitmap directory at %#x: %w", uint64(off), err)
	}
	count := uint32(0)
	for ; len(dir) > 0; count++ {
		n := bitmapEntrySize(dir)
		if n == 0 {
			c.problem(false, off, "ERROR bitmap directory at %#x: entry %d is invalid", uint64(off), count)
			return nil
		}
		if err := c.countBitmap(HostOffset(binary.BigEndian.Uint64(dir)), binary.BigEndian.Uint32(dir[8:])); err != nil {
			return err
		}
		dir = dir[n:]
	}
	if n := binary.BigEndian.Uint32(ext); n != count {
		c.problem(false, off, "ERROR bitmap directory at %#x: %d entries, %d in the header extension", uint64(off), count, n)
	}
	return nil
}

// bitmapEntrySize returns the bytes of the first entry of dir, 0 if it is not valid.
func bitmapEntrySize(dir []byte) int {
	if len(dir) < bitmapEntryBytes {
		return 0
	}
	kind, granularity, name := dir[16], dir[17], int64(binary.BigEndian.Uint16(dir[18:]))
	n := (bitmapEntryBytes + name + int64(binary.BigEndian.Uint32(dir[20:])) + 7) &^ 7
	if kind != 1 || granularity < 9 || granularity > 31 || name < 1 || name > 1023 || n > int64(len(dir)) {
		return 0
	}
	return int(n)
}

// countBitmap counts a bitmap table of n entries at off, and its clusters.
func (c *checker) countBitmap(off HostOffset, n uint32) error {
	if n > maxBitmapTableEntries || !c.g.aligned(off) || off >= maxHostOffset {
		c.problem(false, off, "ERROR bitmap table at %#x of %d entries: invalid directory entry", uint64(off), n)
		return nil
	}
	c.addTable(off, int64(n)*entryBytes)
	const step = checkReadBytes / entryBytes
	for n > 0 && int64(off) < c.fileBytes {
		part := min(n, step)
		entries, err := c.readEntries(off, int64(part))
		if err != nil {
			return err
		}
		for i, e := range entries {
			data := HostOffset(e & entryOffsetMask)
			switch {
			case e&bitmapEntryReserved != 0 || !c.g.aligned(data) || data != 0 && e&1 != 0:
				c.problem(false, off+HostOffset(i)*entryBytes, "ERROR bitmap table entry %x is invalid", e)
			case data != 0:
				c.addTable(data, c.g.clusterSize)
			}
		}
		off += HostOffset(part) * entryBytes
		n -= part
	}
	return nil
}
