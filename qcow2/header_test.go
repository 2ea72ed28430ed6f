package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"

	"csi-qcow2/internal/storagetest"
)

// fileOf returns a file with the content b.
func fileOf(t testing.TB, b []byte) *storagetest.Disk {
	t.Helper()
	d := storagetest.NewDisk()
	if _, err := d.WriteAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return d
}

// soundHeader is a valid header of version 3 with something in every field.
func soundHeader() *header {
	return &header{
		version: 3, clusterBits: 12, size: 10 << 20,
		l1Size: 8, l1Offset: 0x3000, refcountTableOffset: 0x1000, refcountTableClusters: 1,
		nbSnapshots: 2, snapshotsOffset: 0x5000,
		incompatible: incompatDirty | incompatCompression, compatible: compatLazyRefcounts | 1<<40, autoclear: autoclearBitmaps | 1<<41,
		refcountOrder: 3, headerLength: headerBytesV3Known, compressionType: compressionZstd, tail: make([]byte, 7),
		backingName: "base.qcow2", backingFormat: "qcow2",
		extensions: []headerExtension{
			{extFeatureNames, encodeFeatureNames(featureNames())},
			{0x12345678, []byte("unknown, 13 b")},
		},
	}
}

func TestHeaderRoundTrip(t *testing.T) {
	v2 := &header{version: 2, clusterBits: 9, size: 512, l1Size: 1, l1Offset: 0x400, refcountTableOffset: 0x200,
		refcountTableClusters: 1, refcountOrder: 4, headerLength: headerBytesV2}
	v2backing := *v2
	v2backing.backingName, v2backing.backingFormat = strings.Repeat("x", 400), "raw"
	short := *soundHeader()
	short.headerLength, short.tail, short.compressionType = headerBytesV3, nil, compressionZlib
	short.incompatible = incompatCorrupt
	long := *soundHeader()
	long.headerLength, long.tail = 128, []byte("\x00\x00\x00\x00\x00\x00\x00unknown fields!!")
	for name, h := range map[string]*header{"v3": soundHeader(), "v2": v2, "v2 backing": &v2backing, "104 bytes": &short, "128 bytes": &long} {
		t.Run(name, func(t *testing.T) {
			b, err := h.encodeCluster()
			if err != nil {
				t.Fatal(err)
			}
			if len(b) != 1<<h.clusterBits {
				t.Errorf("%d bytes, want a cluster", len(b))
			}
			got, err := readHeader(fileOf(t, b))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, h) {
				t.Errorf("\ngot  %+v\nwant %+v", got, h)
			}
			again, err := got.encodeCluster()
			if err != nil || !bytes.Equal(again, b) {
				t.Errorf("encoded again it differs (%v)", err)
			}
		})
	}
}

func TestEncodeHeaderThatDoesNotFit(t *testing.T) {
	h := soundHeader()
	h.backingName = strings.Repeat("x", maxBackingName)
	if _, err := h.encodeCluster(); err != nil {
		t.Errorf("a name of %d bytes: %v", maxBackingName, err)
	}
	h.backingName += "x"
	if _, err := h.encodeCluster(); err == nil || !strings.Contains(err.Error(), "at most 1023") {
		t.Errorf("a name of 1024 bytes: %v", err)
	}
	h = soundHeader()
	h.clusterBits = 9
	if _, err := h.encodeCluster(); err == nil || !strings.Contains(err.Error(), "larger clusters") {
		t.Errorf("a feature name table in 512 bytes: %v", err)
	}
}

// TestReadHeaderRefuses changes one field at a time of a valid header.
func TestReadHeaderRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		off   int
		bytes int
		value uint64
		want  error
		text  string
	}{
		{"magic", 0, 4, 0x514649fc, ErrNotQcow2, "not a qcow2"},
		{"version 1", 4, 4, 1, ErrUnsupported, "version 1"},
		{"version 4", 4, 4, 4, ErrUnsupported, "version 4"},
		{"name before the extensions", 8, 8, 8, ErrCorrupt, "backing_file_offset"},
		{"name outside the cluster", 8, 8, 0x1001, ErrCorrupt, "backing_file_offset 0x1001"},
		{"name far outside", 8, 8, 1 << 63, ErrCorrupt, "backing_file_offset"},
		{"long name", 16, 4, 1024, ErrCorrupt, "1024 bytes long; 1023 fit"},
		{"name over the end", 8, 8, 0xffe, ErrCorrupt, "bytes long; 2 fit"},
		{"small clusters", 20, 4, 8, ErrCorrupt, "cluster_bits is 8"},
		{"large clusters", 20, 4, 22, ErrCorrupt, "cluster_bits is 22"},
		{"huge size", 24, 8, 1 << 63, ErrCorrupt, "virtual size"},
		{"L1 too small", 24, 8, 8<<21 + 1, ErrCorrupt, "8 entries are too few"},
		{"AES", 32, 4, 1, ErrUnsupported, "encrypted"},
		{"LUKS", 32, 4, 2, ErrUnsupported, "encrypted"},
		{"L1 too large", 36, 4, 32<<17 + 1, ErrCorrupt, "L1 table at 0x3000: 4194305"},
		{"L1 unaligned", 40, 8, 0x3200, ErrCorrupt, "L1 table at 0x3200"},
		{"L1 beyond 2^56", 40, 8, 1 << 56, ErrCorrupt, "beyond 2^56"},
		{"refcount table unaligned", 48, 8, 0x1008, ErrCorrupt, "refcount table at 0x1008"},
		{"refcount table too large", 56, 4, 8<<8 + 1, ErrCorrupt, "refcount table at 0x1000: 2049"},
		{"refcount table much too large", 56, 4, 1<<32 - 1, ErrCorrupt, "refcount table"},
		{"too many snapshots", 60, 4, 65537, ErrCorrupt, "snapshot table at 0x5000: 65537"},
		{"snapshot table unaligned", 64, 8, 0x5001, ErrCorrupt, "snapshot table at 0x5001"},
		{"data file", 72, 8, 1<<2 | 1<<3, ErrUnsupported, `bit 2 ("external data file")`},
		{"extended L2", 72, 8, 1<<4 | 1<<3, ErrUnsupported, `bit 4 ("extended L2 entries")`},
		{"unknown features", 72, 8, 1<<63 | 1<<5 | 1<<3, ErrUnsupported, "bit 5, bit 63"},
		{"refcount order", 96, 4, 7, ErrCorrupt, "refcount_order is 7"},
		{"short header", 100, 4, 96, ErrCorrupt, "header_length is 96"},
		{"odd header", 100, 4, 108, ErrCorrupt, "header_length is 108"},
		{"long header", 100, 4, 4104, ErrCorrupt, "header_length is 4104"},
		{"compression type", 104, 1, 2, ErrUnsupported, "compression type 2"},
		{"zstd without its bit", 72, 8, 0, ErrCorrupt, "contradicts"},
		{"zstd bit without zstd", 104, 1, 0, ErrCorrupt, "contradicts"},
		{"long extension", 116, 4, 4096, ErrCorrupt, "header extension at 0x70"},
		{"long backing format", 116, 4, 16, ErrCorrupt, "backing format is 16 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := soundHeader().encodeCluster()
			if err != nil {
				t.Fatal(err)
			}
			var v [8]byte
			binary.BigEndian.PutUint64(v[:], c.value)
			copy(b[c.off:], v[8-c.bytes:])
			_, err = readHeader(fileOf(t, b))
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
}

func TestReadHeaderOfShortFile(t *testing.T) {
	b, err := soundHeader().encodeCluster()
	if err != nil {
		t.Fatal(err)
	}
	for n := range headerBytesV3Known {
		_, err := readHeader(fileOf(t, b[:n]))
		if want := ErrCorrupt; n < 4 {
			if !errors.Is(err, ErrNotQcow2) {
				t.Errorf("%d bytes: %v", n, err)
			}
		} else if err == nil || n >= 24 && !errors.Is(err, want) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestUnknownFeatureNamedByImage: who made the image knows what it needs.
func TestUnknownFeatureNamedByImage(t *testing.T) {
	h := soundHeader()
	h.extensions = []headerExtension{{extFeatureNames, encodeFeatureNames([]featureName{
		{featureCompatible, 9, "not this"}, {featureIncompatible, 9, "time travel"},
	})}}
	h.incompatible |= 1 << 9
	b, err := h.encodeCluster()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readHeader(fileOf(t, b)); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `bit 9 ("time travel")`) {
		t.Errorf("got %v", err)
	}
}

func TestValidateTables(t *testing.T) {
	sound := func() (*header, []snapshotRecord) {
		h := soundHeader()
		h.l1Size, h.size = 1024, 1<<20 // two clusters: 0x3000-0x5000
		return h, []snapshotRecord{
			{id: "1", name: "one", l1Offset: 0x6000, l1Size: 4, diskSize: 1},
			{id: "2", name: "two", l1Offset: 0x7000, l1Size: 512, diskSize: 1},
		}
	}
	for _, c := range []struct {
		name string
		do   func(h *header, s []snapshotRecord)
		text string
	}{
		{"sound", func(*header, []snapshotRecord) {}, ""},
		{"no refcount table", func(h *header, _ []snapshotRecord) { h.refcountTableClusters = 0 }, "refcount table at 0x1000: the header says that there is none"},
		{"L1 in the header", func(h *header, _ []snapshotRecord) { h.l1Offset = 0 }, "L1 table at 0x0: overlaps the header"},
		{"refcount table in the header", func(h *header, _ []snapshotRecord) { h.refcountTableOffset = 0 }, "refcount table at 0x0: overlaps the header"},
		{"refcount table in the L1", func(h *header, _ []snapshotRecord) { h.refcountTableOffset = 0x4000 }, "refcount table at 0x4000: overlaps the L1 table at 0x3000"},
		{"refcount table runs into the L1", func(h *header, _ []snapshotRecord) { h.refcountTableClusters = 3 }, "L1 table at 0x3000: overlaps the refcount table at 0x1000"},
		{"snapshot L1 in the table", func(_ *header, s []snapshotRecord) { s[0].l1Offset = 0x5000 }, "snapshot L1 table at 0x5000: overlaps the snapshot table"},
		{"snapshots share an L1", func(_ *header, s []snapshotRecord) { s[0].l1Offset = 0x7000 }, "overlaps the snapshot L1 table at 0x7000"},
		{"snapshot L1 unaligned", func(_ *header, s []snapshotRecord) { s[1].l1Offset++ }, `snapshot L1 table at 0x7001: the offset in snapshot "2"`},
		{"snapshot L1 too large", func(_ *header, s []snapshotRecord) { s[1].l1Size = 1<<22 + 1 }, "snapshot L1 table at 0x7000: 4194305 entries"},
		{"snapshot L1 beyond 2^56", func(_ *header, s []snapshotRecord) { s[1].l1Offset = 1 << 60 }, "snapshot L1 table at 0x1000000000000000"},
		{"snapshot table cut off", func(h *header, _ []snapshotRecord) { h.nbSnapshots = 100 }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			h, records := sound()
			c.do(h, records)
			d := storagetest.NewDisk()
			if _, err := d.WriteAt(encodeSnapshotTable(records), int64(h.snapshotsOffset)); err != nil {
				t.Fatal(err)
			}
			err := validateTables(d, h)
			var fe *FormatError
			switch {
			case c.name == "sound":
				if err != nil {
					t.Error(err)
				}
			case !errors.As(err, &fe) || !strings.Contains(err.Error(), c.text):
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
}
