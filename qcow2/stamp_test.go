package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// A stamp fills a sector with who wrote it: it tells right bytes from stale,
// foreign and torn ones.
//
//	Offset  Size  Field   Meaning
//	     0     8  volume  number of the image
//	     8     8  offset  guest offset of the sector
//	    16     8  writer  number of the goroutine
//	    24     8  seq     number of the write, from 1
//	    32   476  filler  low byte of seq
//	   508     4  crc     CRC-32 of the bytes before
type stamp struct{ volume, offset, writer, seq uint64 }

func (s stamp) encode(b []byte) {
	binary.BigEndian.PutUint64(b[0:], s.volume)
	binary.BigEndian.PutUint64(b[8:], s.offset)
	binary.BigEndian.PutUint64(b[16:], s.writer)
	binary.BigEndian.PutUint64(b[24:], s.seq)
	for i := 32; i < 508; i++ {
		b[i] = byte(s.seq)
	}
	binary.BigEndian.PutUint32(b[508:], crc32.ChecksumIEEE(b[:508]))
}

// decodeStamp returns the stamp of sector b, or a zero one for a sector of zeroes.
func decodeStamp(b []byte) (stamp, error) {
	if bytes.Equal(b, zeroSector[:]) {
		return stamp{}, nil
	}
	if crc32.ChecksumIEEE(b[:508]) != binary.BigEndian.Uint32(b[508:]) {
		return stamp{}, fmt.Errorf("torn or foreign sector: % x…", b[:32])
	}
	return stamp{
		binary.BigEndian.Uint64(b[0:]), binary.BigEndian.Uint64(b[8:]),
		binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint64(b[24:]),
	}, nil
}

// stamped returns n bytes of stamps for a write at off.
func stamped(volume, off, n int64, writer, seq uint64) []byte {
	p := make([]byte, n)
	for i := int64(0); i < n; i += 512 {
		stamp{uint64(volume), uint64(off + i), writer, seq}.encode(p[i : i+512])
	}
	return p
}

// wantStamps verifies that each sector of p, read at off, is zero or was
// written there by somebody (P5).
func wantStamps(p []byte, volume, off int64) error {
	for i := 0; i < len(p); i += 512 {
		s, err := decodeStamp(p[i : i+512])
		if err != nil {
			return fmt.Errorf("sector %#x: %w", off+int64(i), err)
		}
		if s != (stamp{}) && (s.volume != uint64(volume) || s.offset != uint64(off)+uint64(i)) {
			return fmt.Errorf("sector %#x holds %+v", off+int64(i), s)
		}
	}
	return nil
}
