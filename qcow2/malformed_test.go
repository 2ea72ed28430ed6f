package qcow2_test

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A layout says where the structures of the good image lie.
type layout struct {
	reftable, refblock, l1, l2, data, snapshots, snapshotL1 int64
}

const malformedCluster = 4096

// goodImage makes an image with data, a compressed cluster and a snapshot.
func goodImage(t testing.TB, o qcow2.CreateOptions) (*storagetest.Disk, layout) {
	t.Helper()
	o.ClusterSize = malformedCluster
	d := newDisk(t, 4<<20, o)
	im := openDisk(t, d, qcow2.Options{})
	if _, err := im.WriteAt(fill(2*malformedCluster, 1), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(fill(malformedCluster, 2), 0); err != nil { // unshares the L2 table
		t.Fatal(err)
	}
	if err := im.WriteCompressed(make([]byte, malformedCluster), 8*malformedCluster); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	verifyDisk(t, d)
	d.Reopen()
	const offset = 0x00fffffffffffe00
	var l layout
	l.reftable = get(t, d, 48, 8)
	l.refblock = get(t, d, l.reftable, 8)
	l.l1 = get(t, d, 40, 8)
	l.l2 = get(t, d, l.l1, 8) & offset
	l.data = get(t, d, l.l2, 8) & offset
	l.snapshots = get(t, d, 64, 8)
	l.snapshotL1 = get(t, d, l.snapshots, 8)
	return d, l
}

// get reads a big-endian field of n bytes.
func get(t testing.TB, d *storagetest.Disk, off int64, n int) int64 {
	t.Helper()
	b := make([]byte, 8)
	if m, err := d.ReadAt(b[8-n:], off); m != n {
		t.Fatal(err)
	}
	return int64(binary.BigEndian.Uint64(b))
}

// put writes a big-endian field of n bytes.
func put(d *storagetest.Disk, off int64, n int, v uint64) {
	b := make([]byte, 8)
	binary.BigEndian.PutUint64(b, v)
	if _, err := d.WriteAt(b[8-n:], off); err != nil {
		panic(err)
	}
}

// maxMalformedBytes bounds what opening or using a bad image may allocate: the
// largest L1 table that is allowed has 32 MiB, and is decoded from bytes.
const maxMalformedBytes = 80 << 20

// refuse opens d, and uses the image if use is not nil, and verifies that this
// fails with target, names a structure, writes nothing and needs little memory.
func refuse(t *testing.T, d *storagetest.Disk, target error, use func(*qcow2.Image) error) {
	t.Helper()
	before := d.Clone()
	d.ResetCounts()
	var m0, m1 runtime.MemStats
	runtime.ReadMemStats(&m0)
	im, err := qcow2.Open(t.Context(), d, qcow2.Options{Cache: newCache(t, 64<<10)})
	if err == nil && use == nil {
		im.Close()
		t.Fatal("Open accepts it")
	}
	if err == nil {
		t.Cleanup(func() { im.Close() })
		err = use(im)
	}
	runtime.ReadMemStats(&m1)
	if !errors.Is(err, target) {
		t.Fatalf("got error %v, want one that is %q", err, target)
	}
	if target == qcow2.ErrCorrupt {
		var f *qcow2.FormatError
		if !errors.As(err, &f) || f.Struct == "" || !strings.Contains(err.Error(), "at 0x") {
			t.Errorf("error %q does not name structure and offset", err)
		}
	}
	if n := m1.TotalAlloc - m0.TotalAlloc; n > maxMalformedBytes {
		t.Errorf("%d bytes allocated, more than %d", n, maxMalformedBytes)
	}
	if im != nil { // the dirty bit may say that a repair is due
		put(d, 79, 1, uint64(get(t, d, 79, 1)&^1))
	}
	if !d.Equal(before) {
		t.Error("the file was changed")
	}
	if im == nil && d.Count(storagetest.OpChange) != 0 {
		t.Error("Open wrote to the file")
	}
}

// TestMalformedHeader sets fields of the header to what must not be.
func TestMalformedHeader(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	for _, test := range []struct {
		name   string
		off    int64
		n      int
		value  uint64
		target error
	}{
		{"Magic", 0, 4, 0x514649fc, qcow2.ErrNotQcow2},
		{"Version1", 4, 4, 1, qcow2.ErrUnsupported},
		{"Version4", 4, 4, 4, qcow2.ErrUnsupported},
		{"BackingOffsetOutsideCluster", 8, 8, 1 << 40, qcow2.ErrCorrupt},
		{"BackingNameHuge", 8, 12, 0, qcow2.ErrCorrupt}, // see below
		{"ClusterBitsSmall", 20, 4, 8, qcow2.ErrCorrupt},
		{"ClusterBitsLarge", 20, 4, 22, qcow2.ErrCorrupt},
		{"ClusterBitsHuge", 20, 4, 0xffffffff, qcow2.ErrCorrupt},
		{"SizeBeyondL1", 24, 8, 1 << 40, qcow2.ErrCorrupt},
		{"SizeHuge", 24, 8, 1<<64 - 512, qcow2.ErrCorrupt},
		{"Encrypted", 32, 4, 1, qcow2.ErrUnsupported},
		{"EncryptionUnknown", 32, 4, 7, qcow2.ErrUnsupported},
		{"L1SizeHuge", 36, 4, 0xffffffff, qcow2.ErrCorrupt},
		{"L1SizeSigned", 36, 4, 0x7fffffff, qcow2.ErrCorrupt},
		{"L1SizeAtLimitBeyondEnd", 36, 4, 32 << 20 / 8, qcow2.ErrCorrupt},
		{"L1SizeZero", 36, 4, 0, qcow2.ErrCorrupt},
		{"L1Unaligned", 40, 8, 0x1234, qcow2.ErrCorrupt},
		{"L1Far", 40, 8, 0x7ffffffffffff000, qcow2.ErrCorrupt},
		{"L1BeyondEnd", 40, 8, 1 << 40, qcow2.ErrCorrupt},
		{"L1OverHeader", 40, 8, 0, qcow2.ErrCorrupt},
		{"L1OverReftable", 40, 8, uint64(l.reftable), qcow2.ErrCorrupt},
		{"L1OverRefblock", 40, 8, uint64(l.refblock), qcow2.ErrCorrupt},
		{"ReftableUnaligned", 48, 8, 0x1234, qcow2.ErrCorrupt},
		{"ReftableFar", 48, 8, 0xffffffffffff0000, qcow2.ErrCorrupt},
		{"ReftableBeyondEnd", 48, 8, 1 << 40, qcow2.ErrCorrupt},
		{"ReftableOverHeader", 48, 8, 0, qcow2.ErrCorrupt},
		{"ReftableHuge", 56, 4, 0x7fffffff, qcow2.ErrCorrupt},
		{"ReftableAboveLimit", 56, 4, 8<<20/malformedCluster + 1, qcow2.ErrCorrupt},
		{"ReftableEmpty", 56, 4, 0, qcow2.ErrCorrupt},
		{"SnapshotsHuge", 60, 4, 0xffffffff, qcow2.ErrCorrupt},
		{"SnapshotsAboveLimit", 60, 4, 65537, qcow2.ErrCorrupt},
		{"SnapshotsMoreThanThere", 60, 4, 60000, qcow2.ErrCorrupt},
		{"SnapshotsUnaligned", 64, 8, 0x1234, qcow2.ErrCorrupt},
		{"SnapshotsFar", 64, 8, 0x7fffffffffff0000, qcow2.ErrCorrupt},
		{"SnapshotsOverL1", 64, 8, uint64(l.l1), qcow2.ErrCorrupt},
		{"IncompatibleUnknown", 72, 8, 1 << 40, qcow2.ErrUnsupported},
		{"RefcountOrder", 96, 4, 7, qcow2.ErrCorrupt},
		{"HeaderLengthHuge", 100, 4, 0xffffffff, qcow2.ErrCorrupt},
		{"HeaderLengthSigned", 100, 4, 0x7fffffff, qcow2.ErrCorrupt},
		{"HeaderLengthShort", 100, 4, 72, qcow2.ErrCorrupt},
		{"HeaderLengthOdd", 100, 4, 105, qcow2.ErrCorrupt},
		{"CompressionUnmarked", 104, 1, 1, qcow2.ErrCorrupt},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := good.Clone()
			if test.n == 12 { // offset and length of the backing file's name
				put(d, test.off, 8, 0x200)
				put(d, test.off+8, 4, 0xffffffff)
			} else {
				put(d, test.off, test.n, test.value)
			}
			refuse(t, d, test.target, nil)
		})
	}
}

// TestMalformedTruncated cuts the file at each structure.
func TestMalformedTruncated(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	for _, size := range []int64{0, 3, 4, 71, 72, 103, 104, 111, 512, l.reftable, l.reftable + 8, l.l1, l.l1 + 4} {
		d := good.Clone()
		if err := d.Truncate(size); err != nil {
			t.Fatal(err)
		}
		im, err := qcow2.Open(t.Context(), d, qcow2.Options{})
		if err == nil {
			im.Close()
			t.Errorf("Open accepts a file of %d bytes", size)
		} else if !errors.Is(err, qcow2.ErrCorrupt) && !errors.Is(err, qcow2.ErrNotQcow2) && !errors.Is(err, qcow2.ErrUnsupported) {
			t.Errorf("file of %d bytes: got error %v", size, err)
		}
	}
}

// TestMalformedCorruptBit refuses to write an image that is marked corrupt, and
// says what to do; reading it is allowed.
func TestMalformedCorruptBit(t *testing.T) {
	d, _ := goodImage(t, qcow2.CreateOptions{})
	put(d, 72, 8, 2)
	_, err := qcow2.Open(t.Context(), d, qcow2.Options{})
	wantErrorIs(t, err, qcow2.ErrCorrupt)
	if !strings.Contains(err.Error(), "check -r") {
		t.Errorf("error %q does not name the remedy", err)
	}
	im := openDisk(t, d, qcow2.Options{ReadOnly: true})
	readAll(t, im)
	mustClose(t, im)
}

// TestMalformedExtensions makes header extensions longer than the header.
func TestMalformedExtensions(t *testing.T) {
	good, _ := goodImage(t, qcow2.CreateOptions{})
	at := get(t, good, 100, 4)
	for _, length := range []uint64{0x7fffffff, 0xffffffff, 0xfffffff8, malformedCluster} {
		d := good.Clone()
		put(d, at, 4, 0x12345678)
		put(d, at+4, 4, length)
		refuse(t, d, qcow2.ErrCorrupt, nil)
	}
}

// TestMalformedSnapshotTable spoils the snapshot table.
func TestMalformedSnapshotTable(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	for _, test := range []struct {
		name  string
		off   int64
		n     int
		value uint64
	}{
		{"L1Unaligned", 0, 8, 0x1234},
		{"L1Far", 0, 8, 0x7fffffffffff0000},
		{"L1OverHeader", 0, 8, 0},
		{"L1OverActive", 0, 8, uint64(l.l1)},
		{"L1Huge", 8, 4, 0x10000000},
		{"ExtraHuge", 36, 4, 0x7fffffff},
		{"SizeHuge", 48, 8, 1<<64 - 1},
		{"IDRunsOut", 12, 2, 0xffff},
		{"NameRunsOut", 14, 2, 0xffff},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := good.Clone()
			put(d, l.snapshots+test.off, test.n, test.value)
			refuse(t, d, qcow2.ErrCorrupt, nil)
		})
	}
}

// TestMalformedSnapshotSize asks for a snapshot whose L1 table does not cover
// its virtual size.
func TestMalformedSnapshotSize(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	put(good, l.snapshots+48, 8, 1<<62)
	refuse(t, good.Clone(), qcow2.ErrCorrupt, func(im *qcow2.Image) error { return im.ApplySnapshot(t.Context(), "s") })
	_, err := qcow2.Open(t.Context(), good, qcow2.Options{ReadOnly: true, Snapshot: "s"})
	wantErrorIs(t, err, qcow2.ErrCorrupt)
}

// TestMalformedTables spoils L1, L2 and refcount tables, and then does what
// needs them.
func TestMalformedTables(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	const copied = 1 << 63
	read := func(im *qcow2.Image) error {
		_, err := im.ReadAt(make([]byte, malformedCluster), 0)
		return err
	}
	write := func(im *qcow2.Image) error {
		_, err := im.WriteAt(fill(512, 9), 0)
		return err
	}
	overwrite := func(im *qcow2.Image) error { // a write that allocates, beside the entry
		_, err := im.WriteAt(fill(512, 9), 40*malformedCluster)
		return errors.Join(err, im.Flush())
	}
	discard := func(im *qcow2.Image) error { return im.Discard(0, malformedCluster) }
	snapshot := func(im *qcow2.Image) error {
		_, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
		return err
	}
	remove := func(im *qcow2.Image) error { return im.DeleteSnapshot(t.Context(), "s") }
	apply := func(im *qcow2.Image) error { return im.ApplySnapshot(t.Context(), "s") }
	zero := func(im *qcow2.Image) error { return im.WriteZeroes(0, malformedCluster, true) }
	readPacked := func(im *qcow2.Image) error {
		_, err := im.ReadAt(make([]byte, malformedCluster), 8*malformedCluster)
		return err
	}
	packed := uint64(get(t, good, l.l2+8*8, 8))
	for _, test := range []struct {
		name  string
		off   int64
		value uint64
		use   map[string]func(*qcow2.Image) error
	}{
		{"L1Unaligned", l.l1, uint64(l.l2) + 512 | copied, uses("read", read, "write", write, "discard", discard, "zero", zero, "snapshot", snapshot)},
		{"L1Reserved", l.l1, uint64(l.l2) | copied | 1<<60, uses("read", read, "write", write, "discard", discard, "zero", zero)},
		{"L1BeyondEnd", l.l1, 1<<40 | copied, uses("read", read, "write", write)},
		{"L2Unaligned", l.l2, uint64(l.data) + 512 | copied, uses("read", read, "write", write, "discard", discard, "zero", zero, "snapshot", snapshot)},
		{"L2Reserved", l.l2, uint64(l.data) | copied | 1<<58, uses("read", read, "write", write, "discard", discard, "zero", zero)},
		{"L2CompressedCopied", l.l2 + 8*8, packed | copied, uses("read", readPacked)},
		{"L2CompressedBeyondEnd", l.l2 + 8*8, 1<<62 | 1<<40, uses("read", readPacked)},
		{"L2CompressedGarbage", l.l2 + 8*8, 1<<62 | uint64(l.data), uses("read", readPacked)},
		{"L1OverHeaderOfTables", l.l1, uint64(l.refblock) | copied, uses("write", write, "allocate", overwrite)},
		{"L1OverItself", l.l1, uint64(l.l1) | copied, uses("write", write, "allocate", overwrite)},
		{"L1OverReftable", l.l1, uint64(l.reftable) | copied, uses("write", write, "allocate", overwrite)},
		{"L1OverSnapshotTable", l.l1, uint64(l.snapshots) | copied, uses("write", write, "allocate", overwrite)},
		{"L2OverRefblock", l.l2, uint64(l.refblock) | copied, uses("write", write)},
		{"L2OverReftable", l.l2, uint64(l.reftable) | copied, uses("write", write)},
		{"L2OverL1", l.l2, uint64(l.l1) | copied, uses("write", write)},
		{"L2OverItself", l.l2, uint64(l.l2) | copied, uses("write", write)},
		{"L2OverSnapshotTable", l.l2, uint64(l.snapshots) | copied, uses("write", write)},
		{"L2OverSnapshotL1", l.l2, uint64(l.snapshotL1) | copied, uses("write", write)},
		{"SnapshotL1Unaligned", l.snapshotL1, 0x1200, uses("delete", remove, "apply", apply)},
		{"ReftableUnaligned", l.reftable, uint64(l.refblock) + 512, uses("allocate", overwrite, "snapshot", snapshot)},
		{"ReftableReserved", l.reftable, uint64(l.refblock) | 1, uses("allocate", overwrite, "snapshot", snapshot)},
		{"ReftableBeyondEnd", l.reftable, 1 << 40, uses("allocate", overwrite, "snapshot", snapshot)},
		{"ReftableOverHeader", l.reftable, 0, nil},
		{"ReftableOverL1", l.reftable, uint64(l.l1), uses("allocate", overwrite)},
		{"ReftableOverItself", l.reftable, uint64(l.reftable), uses("allocate", overwrite)},
	} {
		for name, use := range test.use {
			t.Run(test.name+"/"+name, func(t *testing.T) {
				d := good.Clone()
				put(d, test.off, 8, test.value)
				refuse(t, d, qcow2.ErrCorrupt, use)
			})
		}
	}
}

// uses returns a map of names and functions.
func uses(pairs ...any) map[string]func(*qcow2.Image) error {
	m := make(map[string]func(*qcow2.Image) error)
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i].(string)] = pairs[i+1].(func(*qcow2.Image) error)
	}
	return m
}

// TestMalformedFreeMetadata marks clusters of tables as free: nothing may be
// allocated over them.
func TestMalformedFreeMetadata(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	for name, off := range map[string]int64{"Header": 0, "Reftable": l.reftable, "Refblock": l.refblock, "L1": l.l1, "Snapshots": l.snapshots, "SnapshotL1": l.snapshotL1} {
		t.Run(name, func(t *testing.T) {
			d := good.Clone()
			put(d, l.refblock+off/malformedCluster*2, 2, 0)
			want := make([]byte, malformedCluster)
			if _, err := d.ReadAt(want, off); err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.Open(t.Context(), d, qcow2.Options{Cache: newCache(t, 64<<10)})
			if err != nil {
				wantErrorIs(t, err, qcow2.ErrCorrupt)
				return
			}
			for i := range int64(16) {
				if _, err = im.WriteAt(fill(malformedCluster, 77), (100+i)*malformedCluster); err != nil {
					break
				}
			}
			if err == nil {
				err = im.Flush()
			}
			got := make([]byte, malformedCluster)
			if _, rerr := d.ReadAt(got, off); rerr != nil {
				t.Fatal(rerr)
			}
			if name != "Refblock" && name != "L1" && name != "Header" {
				wantSame(t, name, got, want)
			}
			if s := string(got[:16]); s == string(fill(16, 77)) {
				t.Errorf("guest data was written over the %s", name)
			}
			if err != nil {
				wantErrorIs(t, err, qcow2.ErrCorrupt)
			}
			im.Close()
		})
	}
}

// TestMalformedEntryFreesMetadata discards a cluster, and deletes a snapshot, whose
// entry names a table: the table stays.
func TestMalformedEntryFreesMetadata(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{})
	const guest = 9 * malformedCluster // unallocated
	snapshotL2 := get(t, good, l.snapshotL1, 8) & 0x00fffffffffffe00
	for name, off := range map[string]int64{"Reftable": l.reftable, "Refblock": l.refblock, "L1": l.l1} {
		for by, l2 := range map[string]int64{"Discard": l.l2, "DeleteSnapshot": snapshotL2} {
			t.Run(name+"/"+by, func(t *testing.T) {
				d := good.Clone()
				put(d, l2+guest/malformedCluster*8, 8, uint64(off)|1<<63)
				im := openDisk(t, d, qcow2.Options{PassDiscard: true})
				defer im.Close()
				if by == "DeleteSnapshot" {
					wantErrorIs(t, im.DeleteSnapshot(t.Context(), "s"), qcow2.ErrCorrupt)
				} else if err := errors.Join(im.Discard(guest, malformedCluster), im.Flush()); err != nil {
					t.Error(err)
				}
				if get(t, d, off, 8) == 0 { // a table that is there begins with an entry
					t.Error("the table was punched out")
				}
			})
		}
	}
}

// TestMalformedVersion2ZeroFlag refuses the zero flag, which version 2 reserves.
func TestMalformedVersion2ZeroFlag(t *testing.T) {
	good, l := goodImage(t, qcow2.CreateOptions{Version: 2})
	put(good, l.l2, 8, 1)
	refuse(t, good, qcow2.ErrCorrupt, func(im *qcow2.Image) error {
		_, err := im.ReadAt(make([]byte, 512), 0)
		return err
	})
}

// TestMalformedBackingNeedsOpener refuses a backing file that nobody may open.
func TestMalformedBackingNeedsOpener(t *testing.T) {
	d := newDisk(t, 1<<20, qcow2.CreateOptions{BackingFile: "/etc/passwd", BackingFormat: "raw"})
	refuse(t, d, qcow2.ErrUnsupported, nil)
}
