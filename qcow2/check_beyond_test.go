package qcow2_test

import (
	"encoding/binary"
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
