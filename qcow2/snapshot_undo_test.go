package qcow2_test

import (
	"encoding/binary"
	"errors"
	"syscall"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// wantUndone fails the test unless err is want, and the image in d is as if the
// change had not been tried: without the dirty bit, leaks or wrong flags.
func wantUndone(t *testing.T, d *storagetest.Disk, im *qcow2.Image, err, want error) {
	t.Helper()
	wantErrorIs(t, err, want)
	var bits [8]byte
	if _, err := d.ReadAt(bits[:], 72); err != nil { // incompatible_features
		t.Fatal(err)
	}
	if got := binary.BigEndian.Uint64(bits[:]); got != 0 {
		t.Errorf("incompatible features %#x, want 0", got)
	}
	checkClean(t, im, true)
}

// TestApplyWithoutRoomInRefcounts applies a snapshot that refcounts of 2 bits
// cannot count once more: a host cluster has compressed data of three clusters,
// one of them in the snapshot too.
func TestApplyWithoutRoomInRefcounts(t *testing.T) {
	const cluster = 4096
	const table = cluster / 8 * cluster // what an L2 table maps
	d := newDisk(t, 2*table, qcow2.CreateOptions{ClusterSize: cluster, RefcountBits: 2})
	im := useDisk(t, d, qcow2.Options{})
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := im.WriteAt(fill(3*cluster, 1), 0)
	do(err)
	do(im.WriteCompressed(make([]byte, cluster), table))
	s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"})
	do(err)
	_, err = im.WriteAt(fill(cluster, 2), 0)
	do(err)
	do(im.WriteCompressed(make([]byte, cluster), table+cluster))
	do(im.Flush())
	want := readAll(t, im)
	wantUndone(t, d, im, im.ApplySnapshot(t.Context(), s.ID), qcow2.ErrRefcountOverflow)
	wantSame(t, "the disk", readAll(t, im), want)
}

// TestWriteDuringSnapshotWithoutRoom writes while a snapshot is taken that refcounts
// of 2 bits cannot count: the snapshot fails, not the write.
func TestWriteDuringSnapshotWithoutRoom(t *testing.T) {
	const cluster = 4096
	const table = cluster / 8 * cluster // what an L2 table maps
	d := newDisk(t, 2*table, qcow2.CreateOptions{ClusterSize: cluster, RefcountBits: 2})
	im := useDisk(t, d, qcow2.Options{})
	want := make([]byte, 2*table)
	write := func(off int64, p []byte) {
		t.Helper()
		if _, err := im.WriteAt(p, off); err != nil {
			t.Errorf("write at %#x: %v", off, err)
		}
		copy(want[off:], p)
	}
	write(0, fill(3*cluster, 1))
	write(table, fill(3*cluster, 2))
	for i := range int64(2) {
		if err := im.WriteCompressed(make([]byte, cluster), table+(8+i)*cluster); err != nil {
			t.Fatal(err)
		}
	}
	_, err := qcow2.CreateSnapshotsWithin(t.Context(), []qcow2.SnapshotRequest{{Image: im, Snapshot: qcow2.Snapshot{Name: "s"}}}, func(cut func()) error {
		cut()
		write(cluster, fill(cluster, 3))
		write(table+cluster+100, fill(2*cluster, 4))
		return nil
	})
	wantUndone(t, d, im, err, qcow2.ErrRefcountOverflow)
	wantSame(t, "the disk", readAll(t, im), want)
}

// TestSnapshotChangesWithoutSpace applies, deletes and creates snapshots on a host
// that is full.
func TestSnapshotChangesWithoutSpace(t *testing.T) {
	d := newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 4096})
	im := useDisk(t, d, qcow2.Options{})
	var ids []string
	for i := range uint64(2) {
		if _, err := im.WriteAt(fill(1<<20, i), int64(i)<<18); err != nil {
			t.Fatal(err)
		}
		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, s.ID)
	}
	if _, err := im.WriteAt(fill(1<<20, 7), 1<<17); err != nil {
		t.Fatal(err)
	}
	want := readAll(t, im)
	full := &storagetest.Fault{Ops: storagetest.OpAllocate, N: 1, Err: syscall.ENOSPC, Sticky: true}
	d.Inject(full)
	wantUndone(t, d, im, im.ApplySnapshot(t.Context(), ids[0]), syscall.ENOSPC)
	wantUndone(t, d, im, im.DeleteSnapshot(t.Context(), ids[0]), syscall.ENOSPC)
	_, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"})
	wantUndone(t, d, im, err, syscall.ENOSPC)
	wantSame(t, "the disk", readAll(t, im), want)
	if n := len(im.Snapshots()); n != len(ids) {
		t.Errorf("%d snapshots, want %d", n, len(ids))
	}
	d.Clear()
	err = errors.Join(im.DeleteSnapshot(t.Context(), ids[0]), im.ApplySnapshot(t.Context(), ids[1]))
	wantUndone(t, d, im, err, nil)
}

// TestGroupUndoWithoutSpace lets a member of a group fail when another has its
// snapshot already, which then cannot be removed for lack of space: it stays, and
// both images are whole.
func TestGroupUndoWithoutSpace(t *testing.T) {
	var disks []*storagetest.Disk
	var images []*qcow2.Image
	var requests []qcow2.SnapshotRequest
	for i := range uint64(2) {
		d := newDisk(t, 1<<20, qcow2.CreateOptions{ClusterSize: 4096})
		im := useDisk(t, d, qcow2.Options{})
		if _, err := im.WriteAt(fill(1<<18, i), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "before"}); err != nil {
			t.Fatal(err)
		}
		disks, images = append(disks, d), append(images, im)
		requests = append(requests, qcow2.SnapshotRequest{Image: im, Snapshot: qcow2.Snapshot{Name: "group"}})
	}
	// The first needs space for an L1 table and a snapshot table, and then no more.
	disks[0].Inject(&storagetest.Fault{Ops: storagetest.OpAllocate, N: 3, Err: syscall.ENOSPC, Sticky: true})
	disks[1].Inject(&storagetest.Fault{Ops: storagetest.OpAllocate, N: 1, Err: syscall.ENOSPC, Sticky: true})
	_, err := qcow2.CreateSnapshots(t.Context(), requests)
	for i, im := range images {
		wantUndone(t, disks[i], im, err, syscall.ENOSPC)
		if got, want := len(im.Snapshots()), 2-i; got != want {
			t.Errorf("image %d has %d snapshots, want %d", i, got, want)
		}
		disks[i].Clear()
	}
	if err := images[0].DeleteSnapshot(t.Context(), "group"); err != nil {
		t.Error(err)
	}
	wantUndone(t, disks[0], images[0], err, syscall.ENOSPC)
}
