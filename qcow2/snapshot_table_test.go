package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"csi-qcow2/internal/storagetest"
)

// fileWithTable returns a file with a snapshot table at 0x1000 and a header for it.
func fileWithTable(t testing.TB, table []byte, n int) (*storagetest.Disk, *header) {
	t.Helper()
	d := storagetest.NewDisk()
	if _, err := d.WriteAt(table, 0x1000); err != nil {
		t.Fatal(err)
	}
	return d, &header{version: 3, clusterBits: 12, size: 4711, nbSnapshots: uint32(n), snapshotsOffset: 0x1000}
}

func TestSnapshotTableRoundTrip(t *testing.T) {
	want := []snapshotRecord{
		{id: "1", name: "one", l1Offset: 0x2000, l1Size: 3, dateSec: 4, dateNsec: 5, vmClockNsec: 6, vmStateSize: 7, diskSize: 8, icount: 9, unknownExtra: []byte{}},
		{id: "", name: "", diskSize: 0, icount: icountNotRecorded, unknownExtra: []byte("17 unknown bytes!")},
		{id: strings.Repeat("i", 65535), name: strings.Repeat("n", 65535), vmStateSize: 1 << 40, diskSize: 1, unknownExtra: make([]byte, maxSnapshotExtra-snapshotExtraBytes)},
		{id: "last", name: "three", unknownExtra: []byte{}},
	}
	table := encodeSnapshotTable(want)
	if len(table)%8 != 0 {
		t.Errorf("table of %d bytes is not padded", len(table))
	}
	d, h := fileWithTable(t, table, len(want))
	got, n, err := readSnapshotTableSize(d, h)
	if err != nil || n != int64(len(table)) {
		t.Fatalf("%d of %d bytes, %v", n, len(table), err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("\ngot  %+v\nwant %+v", got, want)
	}
	if !bytes.Equal(encodeSnapshotTable(got), table) {
		t.Error("encoded again it differs")
	}
}

// TestSnapshotRecordsOfOldVersions: extra data came in three steps.
func TestSnapshotRecordsOfOldVersions(t *testing.T) {
	for extra, want := range map[int]snapshotRecord{
		0:  {vmStateSize: 7, diskSize: 4711, icount: icountNotRecorded, incomplete: true},
		8:  {vmStateSize: 1 << 40, diskSize: 4711, icount: icountNotRecorded, incomplete: true},
		16: {vmStateSize: 1 << 40, diskSize: 512, icount: icountNotRecorded},
		20: {vmStateSize: 1 << 40, diskSize: 512, icount: icountNotRecorded},
		24: {vmStateSize: 1 << 40, diskSize: 512, icount: 99, unknownExtra: []byte{}},
	} {
		b := make([]byte, snapshotFixedBytes)
		binary.BigEndian.PutUint16(b[12:], 1)
		binary.BigEndian.PutUint32(b[32:], 7)
		binary.BigEndian.PutUint32(b[36:], uint32(extra))
		data := binary.BigEndian.AppendUint64(nil, 1<<40)
		data = binary.BigEndian.AppendUint64(data, 512)
		data = binary.BigEndian.AppendUint64(data, 99)
		b = append(append(b, data[:extra]...), 'x')
		d, h := fileWithTable(t, b, 1) // without padding, as QEMU leaves it
		got, err := readSnapshotTable(d, h)
		if err != nil {
			t.Errorf("%d bytes of extra data: %v", extra, err)
			continue
		}
		want.id = "x"
		if !reflect.DeepEqual(got[0], want) {
			t.Errorf("%d bytes of extra data:\ngot  %+v\nwant %+v", extra, got[0], want)
		}
	}
}

func TestSnapshotTableRefuses(t *testing.T) {
	sound := encodeSnapshotTable([]snapshotRecord{{id: "1", name: "one"}, {id: "2", name: "two"}})
	for _, c := range []struct {
		name  string
		table func() []byte
		n     int
		text  string
	}{
		{"ends in the fixed part", func() []byte { return sound[:100] }, 2, "snapshot table entry at 0x1048: the file ends inside it"},
		{"ends in the name", func() []byte { return sound[:len(sound)-6] }, 2, "snapshot table entry at 0x1048: the file ends inside it"},
		{"one more than there are", func() []byte { return sound }, 3, "snapshot table entry at 0x1090: the file ends"},
		{"much extra data", func() []byte {
			b := bytes.Clone(sound)
			binary.BigEndian.PutUint32(b[36:], maxSnapshotExtra+1)
			return b
		}, 2, "1025 bytes of extra data"},
		{"too long", func() []byte {
			big := snapshotRecord{id: strings.Repeat("i", 65535), name: strings.Repeat("n", 65535)}
			return encodeSnapshotTable(slices.Repeat([]snapshotRecord{big}, 520))
		}, 520, "more than 67108864 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, h := fileWithTable(t, c.table(), c.n)
			_, err := readSnapshotTable(d, h)
			if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
}
