package qcow2_test

import (
	"encoding/binary"
	"runtime"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
)

// TestLeakBeyondTheEnd leaves a refcount of a cluster that the file does not
// have: QEMU does not see the leak before the file grows, and Open gives it back.
func TestLeakBeyondTheEnd(t *testing.T) {
	d := newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 4 << 10})
	im := openDisk(t, d, qcow2.Options{})
	if _, err := im.WriteAt(fill(40<<10, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	d.Reopen()
	size, err := d.Size()
	if err != nil {
		t.Fatal(err)
	}
	var field [8]byte
	refblock := func() int64 {
		if _, err := d.ReadAt(field[:], 48); err != nil { // refcount_table_offset
			t.Fatal(err)
		}
		if _, err := d.ReadAt(field[:], int64(binary.BigEndian.Uint64(field[:]))); err != nil {
			t.Fatal(err)
		}
		return int64(binary.BigEndian.Uint64(field[:]))
	}()
	if _, err := d.WriteAt([]byte{0, 1}, refblock+size/4096*2); err != nil {
		t.Fatal(err)
	}

	im = openDisk(t, d, qcow2.Options{})
	if res, err := im.Check(t.Context(), qcow2.CheckOptions{}); err != nil || res.Leaks != 1 {
		t.Errorf("check of the image: %+v, %v: want 1 leak", res, err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	im = openDisk(t, d, qcow2.Options{Unclean: true})
	if _, err := im.WriteAt(fill(40<<10, 2), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	path := scratch(t) + "/disk.qcow2"
	if err := d.Dump(path); err != nil {
		t.Fatal(err)
	}
	qemutest.Check(t, path)
}

// TestReferencesBeyondTheEndCostNoMemory checks an image of a few megabytes that
// has four million references beyond its end: all L1 entries name one L2 table.
func TestReferencesBeyondTheEndCostNoMemory(t *testing.T) {
	const tables, entries, cluster = 512, 8192, 64 << 10
	d := newDisk(t, tables*entries*cluster, qcow2.CreateOptions{})
	im := openDisk(t, d, qcow2.Options{})
	if _, err := im.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	d.Reopen()
	read := func(off int64) uint64 {
		t.Helper()
		var b [8]byte
		if _, err := d.ReadAt(b[:], off); err != nil {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(b[:])
	}
	write := func(off int64, words []byte) {
		t.Helper()
		if _, err := d.WriteAt(words, off); err != nil {
			t.Fatal(err)
		}
	}
	l1 := int64(read(40)) // l1_table_offset
	entry := read(l1)
	var l1Words, l2Words []byte
	for range tables {
		l1Words = binary.BigEndian.AppendUint64(l1Words, entry)
	}
	for i := range uint64(entries) {
		l2Words = binary.BigEndian.AppendUint64(l2Words, 1<<40+2*i*cluster)
	}
	write(l1, l1Words)
	write(int64(entry&^(1<<63)), l2Words)

	live := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before, grown := live(), int64(-1)
	r, err := qcow2.CheckFile(t.Context(), d, qcow2.CheckOptions{Progress: func(done float64) {
		if done > 0.7 && grown < 0 { // of 0.8 for the references
			grown = live() - before
		}
	}})
	if err != nil || r.Corruptions < tables*entries {
		t.Errorf("check: %+v, %v; want %d corruptions or more", r, err, tables*entries)
	}
	if grown < 0 || grown > 32<<20 {
		t.Errorf("the check holds %d bytes", grown)
	}
}
