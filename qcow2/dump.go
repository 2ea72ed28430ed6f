package qcow2

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
)

// Dump writes what the structures of the image in f say, one line for each
// field or run of like entries: host offset, bytes, name, meaning. It is for
// people and for tests; the form may change. It needs a valid header; whatever
// else is wrong is shown, not judged.
func Dump(ctx context.Context, w io.Writer, f File) error {
	h, err := readHeader(f)
	if err != nil {
		return err
	}
	fileBytes, err := f.Size()
	if err != nil {
		return err
	}
	out := bufio.NewWriter(w)
	d := &dumper{ctx: ctx, w: out, f: f, fileBytes: fileBytes, h: h, g: h.geometry()}
	d.header()
	d.refcounts()
	d.l1("L1", h.l1Offset, h.l1Size)
	d.snapshots()
	if d.err == nil {
		d.err = ctx.Err()
	}
	if d.err != nil {
		return d.err
	}
	return out.Flush()
}

// A dumper writes a dump. Its first error stays.
type dumper struct {
	ctx context.Context
	w   *bufio.Writer
	f   File
	h   *header
	g   geometry
	err error

	fileBytes int64
}

// read returns n bytes at off, or nil after an error.
func (d *dumper) read(off HostOffset, n int64) []byte {
	if d.err == nil {
		d.err = d.ctx.Err()
	}
	if d.err != nil {
		return nil
	}
	b := make([]byte, n)
	if d.err = readZeroed(d.f, b, off); d.err != nil {
		return nil
	}
	return b
}

// table returns the entries at off, n or as many as the file has.
func (d *dumper) table(off HostOffset, n int64) []byte {
	return d.read(off, entriesInFile(d.fileBytes, off, n)*entryBytes)
}

func (d *dumper) title(format string, args ...any) { fmt.Fprintf(d.w, "\n"+format+"\n", args...) }

// field writes a line for the n bytes at off.
func (d *dumper) field(off HostOffset, n int64, name, format string, args ...any) {
	fmt.Fprintf(d.w, "%08x  %-16x  %-26s  %s\n", uint64(off), d.read(off, min(n, 8)), name, fmt.Sprintf(format, args...))
}

func (d *dumper) header() {
	h := d.h
	fmt.Fprintln(d.w, "header")
	d.field(0, 4, "magic", "%q", headerMagic)
	d.field(4, 4, "version", "%d", h.version)
	d.field(8, 8, "backing_file_offset", "%#x", h.backingOffset)
	d.field(16, 4, "backing_file_size", "%d", h.backingSize)
	d.field(20, 4, "cluster_bits", "%d: %d bytes", h.clusterBits, d.g.clusterSize)
	d.field(hdrOffSize, 8, "size", "%d", h.size)
	d.field(32, 4, "crypt_method", "%d", h.cryptMethod)
	d.field(hdrOffL1Size, 4, "l1_size", "%d", h.l1Size)
	d.field(hdrOffL1Offset, 8, "l1_table_offset", "%#x", uint64(h.l1Offset))
	d.field(hdrOffRefcountTableOffset, 8, "refcount_table_offset", "%#x", uint64(h.refcountTableOffset))
	d.field(hdrOffRefcountTableClusters, 4, "refcount_table_clusters", "%d", h.refcountTableClusters)
	d.field(hdrOffNbSnapshots, 4, "nb_snapshots", "%d", h.nbSnapshots)
	d.field(hdrOffSnapshotsOffset, 8, "snapshots_offset", "%#x", uint64(h.snapshotsOffset))
	if h.version >= 3 {
		d.field(hdrOffIncompatible, 8, "incompatible_features", "%s", describeFeatures(featureIncompatible, h.incompatible, nil))
		d.field(80, 8, "compatible_features", "%s", describeFeatures(featureCompatible, h.compatible, nil))
		d.field(hdrOffAutoclear, 8, "autoclear_features", "%s", describeFeatures(featureAutoclear, h.autoclear, nil))
		d.field(96, 4, "refcount_order", "%d: %d bits", h.refcountOrder, d.g.refcountBits)
		d.field(100, 4, "header_length", "%d", h.headerLength)
		if h.headerLength > headerBytesV3 {
			d.field(headerBytesV3, 1, "compression_type", "%d", h.compressionType)
		}
	}
	if h.backingFormat != "" {
		d.title("backing format %q", h.backingFormat)
	}
	for _, e := range h.extensions {
		d.title("extension %08x, %d bytes", e.magic, len(e.data))
		if e.magic == extFeatureNames {
			for _, n := range decodeFeatureNames(e.data) {
				fmt.Fprintf(d.w, "feature %d.%d %q\n", n.kind, n.bit, n.name)
			}
		}
	}
	if h.backingOffset != 0 {
		d.title("backing file name")
		d.field(HostOffset(h.backingOffset), int64(h.backingSize), "name", "%q", h.backingName)
	}
}

func (d *dumper) refcounts() {
	d.title("refcount table at %#x", uint64(d.h.refcountTableOffset))
	table := d.table(d.h.refcountTableOffset, int64(d.h.refcountTableClusters)<<(d.g.clusterBits-entryBits))
	for i := 0; i < len(table); i += entryBytes {
		e := binary.BigEndian.Uint64(table[i:])
		if e == 0 {
			continue
		}
		d.field(d.h.refcountTableOffset+HostOffset(i), entryBytes, fmt.Sprintf("refcount table[%d]", i/entryBytes), "block at %#x", e)
		d.refblock(refblockOffset(e), hostCluster(i/entryBytes)<<d.g.refblockBits)
	}
}

// refblock writes the runs of equal refcounts in the block at off.
func (d *dumper) refblock(off HostOffset, base hostCluster) {
	b := d.read(off, d.g.clusterSize)
	at := func(i int) uint64 {
		word, shift := d.g.refcountWord(i)
		return d.g.getRefcount(binary.BigEndian.Uint64(b[word*8:]), shift)
	}
	for i, n := 0, len(b)*8/int(d.g.refcountBits); i < n; {
		end := i + 1
		for end < n && at(end) == at(i) {
			end++
		}
		if at(i) != 0 {
			fmt.Fprintf(d.w, "          clusters %d-%d: refcount %d\n", uint64(base)+uint64(i), uint64(base)+uint64(end-1), at(i))
		}
		i = end
	}
}

// l1 writes an L1 table and its L2 tables.
func (d *dumper) l1(name string, off HostOffset, entries uint32) {
	d.title("%s table at %#x, %d entries", name, uint64(off), entries)
	table := d.table(off, int64(entries))
	for i := 0; i < len(table); i += entryBytes {
		if e := l1Entry(binary.BigEndian.Uint64(table[i:])); e != 0 {
			d.field(off+HostOffset(i), entryBytes, fmt.Sprintf("%s[%d]", name, i/entryBytes), "L2 table at %#x%s%s",
				uint64(e.offset()), ifSet(e.copied(), " COPIED"), reservedBits(e.reserved()))
			d.l2(e.offset())
		}
	}
}

// l2 writes the runs of like entries in the L2 table at off.
func (d *dumper) l2(off HostOffset) {
	b := d.read(off, d.g.clusterSize)
	at := func(i int) l2Entry { return l2Entry(binary.BigEndian.Uint64(b[i*entryBytes:])) }
	for i, n := 0, len(b)/entryBytes; i < n; {
		end := i + 1
		for end < n && d.follows(at(end-1), at(end)) {
			end++
		}
		if e := at(i); e != 0 {
			d.field(off+HostOffset(i*entryBytes), entryBytes, fmt.Sprintf("  L2[%d-%d]", i, end-1), "%s", d.describe(e))
		}
		i = end
	}
}

// follows reports whether next continues a run of entries after e.
func (d *dumper) follows(e, next l2Entry) bool {
	switch e.kind() {
	case kindCompressed:
		return false
	case kindNormal, kindZeroAllocated:
		return next == e+l2Entry(d.g.clusterSize)
	}
	return next == e
}

func (d *dumper) describe(e l2Entry) string {
	var s string
	switch e.kind() {
	case kindCompressed:
		off, n := e.compressedRange(&d.g)
		return fmt.Sprintf("compressed at %#x, %d bytes%s", uint64(off), n, ifSet(e.copied(), " COPIED"))
	case kindZero:
		s = "zero"
	case kindZeroAllocated:
		s = fmt.Sprintf("zero, cluster at %#x", uint64(e.offset()))
	case kindNormal:
		s = fmt.Sprintf("data at %#x", uint64(e.offset()))
	default:
		s = "unallocated"
	}
	return s + ifSet(e.copied(), " COPIED") + reservedBits(e.reserved())
}

func (d *dumper) snapshots() {
	records, bytes, err := readSnapshotTableSize(d.f, d.h)
	if err != nil {
		d.err = err
	}
	if d.err != nil || len(records) == 0 {
		return
	}
	d.title("snapshot table at %#x, %d bytes", uint64(d.h.snapshotsOffset), bytes)
	for i := range records {
		s := &records[i]
		fmt.Fprintf(d.w, "snapshot %d: ID %q, name %q, VM clock %d ns, VM state %d bytes, disk %d bytes, icount %#x, %d bytes unknown\n",
			i, s.id, s.name, s.vmClockNsec, s.vmStateSize, s.diskSize, s.icount, len(s.unknownExtra))
		if err := s.validateL1(&d.g); err != nil {
			d.err = err
			return
		}
		d.l1("snapshot L1", s.l1Offset, s.l1Size)
	}
}

// ifSet returns name if set, else nothing.
func ifSet(set bool, name string) string {
	if set {
		return name
	}
	return ""
}

func reservedBits(bits uint64) string {
	if bits == 0 {
		return ""
	}
	return fmt.Sprintf(" reserved bits %#x", bits)
}
