package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"syscall"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// TestResizeShowsNothingOld grows images whose tables map something beyond the end
// of the disk, as QEMU leaves the VM state of a snapshot that was applied.
func TestResizeShowsNothingOld(t *testing.T) {
	const whole = 8 << 20 // four L2 tables
	for _, version := range []int{2, 3} {
		for _, size := range []int64{512, 256 << 10, 2<<20 + 1536} {
			t.Run(fmt.Sprintf("v%d/%d", version, size), func(t *testing.T) {
				d := newDisk(t, whole, qcow2.CreateOptions{ClusterSize: 4096, Version: version})
				im := openDisk(t, d, qcow2.Options{})
				want := fill(whole, 1)
				if _, err := im.WriteAt(want, 0); err != nil {
					t.Fatal(err)
				}
				mustClose(t, im)
				d.Reopen()
				if _, err := d.WriteAt(binary.BigEndian.AppendUint64(nil, uint64(size)), 24); err != nil {
					t.Fatal(err)
				}

				im = useDisk(t, d, qcow2.Options{})
				clear(want[size:])
				for _, grown := range []int64{size + 512, 3 << 20, whole + 1<<20} {
					if err := im.Resize(t.Context(), grown); err != nil {
						t.Fatal(err)
					}
					got := readAll(t, im)
					n := min(grown, whole)
					wantSame(t, fmt.Sprintf("%d bytes", grown), got[:n], want[:n])
					if len(bytes.Trim(got[n:], "\x00")) > 0 {
						t.Error("new bytes are not zero")
					}
				}
			})
		}
	}
}

// TestResizeThatCannotGrowTheFile fails where the new L1 table has its refcounts.
func TestResizeThatCannotGrowTheFile(t *testing.T) {
	d := newDisk(t, 1<<20, qcow2.CreateOptions{})
	im := useDisk(t, d, qcow2.Options{})
	d.Inject(&storagetest.Fault{Ops: storagetest.OpTruncate, N: 1, Err: syscall.EFBIG})
	wantErrorIs(t, im.Resize(t.Context(), 8<<40), syscall.EFBIG)
	checkClean(t, im, true)
	if err := im.Resize(t.Context(), 8<<40); err != nil {
		t.Error(err)
	}
}

// TestSnapshotOfNoBytes applies a snapshot of a disk of no bytes, as QEMU does.
func TestSnapshotOfNoBytes(t *testing.T) {
	im := useDisk(t, newDisk(t, 0, qcow2.CreateOptions{}), qcow2.Options{})
	s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Resize(t.Context(), 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt([]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.ApplySnapshot(t.Context(), s.ID); err != nil || im.Size() != 0 {
		t.Errorf("a disk of %d bytes, %v; want 0", im.Size(), err)
	}
}
