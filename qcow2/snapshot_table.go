package qcow2

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// A snapshotRecord is an entry of the snapshot table.
//
//	Offset  Size  Field            Meaning
//	     0     8  l1_table_offset  host offset of the L1 table, cluster aligned
//	     8     4  l1_size          entries of the L1 table
//	    12     2  id_str_size      bytes
//	    14     2  name_size        bytes
//	    16     4  date_sec         seconds since 1970
//	    20     4  date_nsec        nanoseconds
//	    24     8  vm_clock_nsec    guest run time
//	    32     4  vm_state_size    bytes; 0 if the extra data has more than 32 bits
//	    36     4  extra_data_size  bytes; version 3 requires 16 or more
//	    40     n  extra data       see below
//	             ID, name, padding to a multiple of 8
//
// Extra data:
//
//	 0     8  vm_state_size    replaces the 32-bit field
//	 8     8  disk_size        virtual size when it was taken, bytes
//	16     8  icount           executed guest instructions; all ones means not recorded
//
// Spec: qcow2 "Snapshots".
type snapshotRecord struct {
	l1Offset     HostOffset
	l1Size       uint32 // entries
	id, name     string
	dateSec      uint32
	dateNsec     uint32
	vmClockNsec  uint64
	vmStateSize  uint64 // bytes
	diskSize     uint64 // bytes; as QEMU, the image's size if the table has none
	icount       uint64 // all ones: not recorded
	unknownExtra []byte // extra data after icount
	incomplete   bool   // read without a disk size, which version 3 requires
}

const (
	snapshotFixedBytes   = 40
	snapshotExtraBytes   = 24         // what QEMU 5.0 and later write
	snapshotExtraBytesV3 = 16         // what version 3 requires
	icountNotRecorded    = ^uint64(0) // in snapshotRecord.icount
)

// readSnapshotTable reads the snapshot table that h names. It allocates in
// proportion to what it has read, never to what the table claims.
func readSnapshotTable(f File, h *header) ([]snapshotRecord, error) {
	records, _, err := readSnapshotTableSize(f, h)
	return records, err
}

// readSnapshotTableSize is readSnapshotTable, and returns the bytes of the table too.
func readSnapshotTableSize(f File, h *header) ([]snapshotRecord, int64, error) {
	if h.nbSnapshots == 0 {
		return nil, 0, nil
	}
	base := int64(h.snapshotsOffset) // below 2^56: header.validate
	r := &snapshotReader{r: bufio.NewReaderSize(io.NewSectionReader(f, base, math.MaxInt64-base), 64<<10), base: h.snapshotsOffset}
	var records []snapshotRecord
	for range h.nbSnapshots {
		s := r.next()
		if r.err != nil {
			return nil, 0, r.err
		}
		if s.incomplete {
			s.diskSize = h.size
		}
		records = append(records, s)
	}
	return records, r.read, nil
}

// A snapshotReader decodes a snapshot table from a stream. Its first error stays.
type snapshotReader struct {
	r    *bufio.Reader
	base HostOffset // of the table
	read int64      // bytes
	err  error
}

// next decodes the next entry.
func (r *snapshotReader) next() snapshotRecord {
	start := r.base + HostOffset(r.read)
	b := r.bytes(snapshotFixedBytes, start)
	if r.err != nil {
		return snapshotRecord{}
	}
	be := binary.BigEndian
	s := snapshotRecord{
		l1Offset:    HostOffset(be.Uint64(b)),
		l1Size:      be.Uint32(b[8:]),
		dateSec:     be.Uint32(b[16:]),
		dateNsec:    be.Uint32(b[20:]),
		vmClockNsec: be.Uint64(b[24:]),
		vmStateSize: uint64(be.Uint32(b[32:])),
		icount:      icountNotRecorded,
		incomplete:  true,
	}
	extraSize := be.Uint32(b[36:])
	if extraSize > maxSnapshotExtra {
		r.err = corruptf("snapshot table entry", start, "%d bytes of extra data, more than %d", extraSize, maxSnapshotExtra)
		return s
	}
	extra := r.bytes(int(extraSize), start)
	if len(extra) >= 8 {
		s.vmStateSize = be.Uint64(extra)
	}
	if len(extra) >= snapshotExtraBytesV3 {
		s.diskSize, s.incomplete = be.Uint64(extra[8:]), false
	}
	if len(extra) >= snapshotExtraBytes {
		s.icount = be.Uint64(extra[16:])
		s.unknownExtra = extra[snapshotExtraBytes:]
	}
	s.id = string(r.bytes(int(be.Uint16(b[12:])), start))
	s.name = string(r.bytes(int(be.Uint16(b[14:])), start))
	if r.err == nil {
		r.skip(int(-r.read & 7))
	}
	if r.err == nil && r.read > maxSnapshotTable {
		r.err = corruptf("snapshot table", r.base, "more than %d bytes long", maxSnapshotTable)
	}
	return s
}

// bytes returns the next n bytes of the entry at start.
func (r *snapshotReader) bytes(n int, start HostOffset) []byte {
	if r.err != nil {
		return nil
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r.r, b)
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		r.err = corruptf("snapshot table entry", start, "the file ends inside it")
	case err != nil:
		r.err = fmt.Errorf("qcow2: snapshot table: %w", err)
	}
	r.read += int64(n)
	return b
}

// skip passes over n bytes of padding, which QEMU does not write at the end of
// a table: the file may end before them.
func (r *snapshotReader) skip(n int) {
	if _, err := r.r.Discard(n); err != nil && !errors.Is(err, io.EOF) {
		r.err = fmt.Errorf("qcow2: snapshot table: %w", err)
	}
	r.read += int64(n)
}

// encodeSnapshotTable returns the table of records: each padded to a multiple
// of 8 bytes, with the 24 bytes of extra data that QEMU writes and what was
// unknown after them.
//
// IDs and names must not be longer than 65535 bytes.
func encodeSnapshotTable(records []snapshotRecord) []byte {
	var b []byte
	be := binary.BigEndian
	for i := range records {
		s := &records[i]
		var small uint32 // a state that needs 64 bits is only in the extra data
		if s.vmStateSize <= 1<<32-1 {
			small = uint32(s.vmStateSize)
		}
		b = be.AppendUint64(b, uint64(s.l1Offset))
		b = be.AppendUint32(b, s.l1Size)
		b = be.AppendUint16(b, uint16(len(s.id)))
		b = be.AppendUint16(b, uint16(len(s.name)))
		b = be.AppendUint32(b, s.dateSec)
		b = be.AppendUint32(b, s.dateNsec)
		b = be.AppendUint64(b, s.vmClockNsec)
		b = be.AppendUint32(b, small)
		b = be.AppendUint32(b, uint32(snapshotExtraBytes+len(s.unknownExtra)))
		b = be.AppendUint64(b, s.vmStateSize)
		b = be.AppendUint64(b, s.diskSize)
		b = be.AppendUint64(b, s.icount)
		b = append(b, s.unknownExtra...)
		b = append(b, s.id...)
		b = append(b, s.name...)
		b = append(b, make([]byte, -len(b)&7)...)
	}
	return b
}
