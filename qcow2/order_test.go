package qcow2_test

import (
	"encoding/binary"
	"path/filepath"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// Edge E1 in the cases in which no other edge happens to ask for the same sync:
// no refcount block is dirty, and still the first thing that a pass does is a sync.

const orderCluster = 64 << 10

// l2Table returns where the first L2 table of the image in d lies.
func l2Table(t *testing.T, d *storagetest.Disk) int64 {
	t.Helper()
	var field [8]byte
	for _, at := range []int64{40, 0} { // l1_table_offset, then entry 0 there
		off := at
		if at == 0 {
			off = int64(binary.BigEndian.Uint64(field[:]) &^ (1 << 63))
		}
		if _, err := d.ReadAt(field[:], off); err != nil {
			t.Fatal(err)
		}
	}
	return int64(binary.BigEndian.Uint64(field[:]) &^ (1 << 63))
}

// wantSyncFirst fails the test unless events begin with a sync and go on with the
// write of an L2 table.
func wantSyncFirst(t *testing.T, what string, d *storagetest.Disk, events []storagetest.Event) {
	t.Helper()
	l2 := l2Table(t, d)
	if len(events) < 2 || events[0].Op != storagetest.OpSync || events[1].Off/orderCluster != l2/orderCluster {
		t.Errorf("%s: the pass begins with %v: want a sync, then a write of the L2 table at %#x", what, events[:min(3, len(events))], l2)
	}
}

func writeCluster(t *testing.T, im *qcow2.Image, n int64) {
	t.Helper()
	if _, err := im.WriteAt(fill(4096, uint64(n)), n*orderCluster+4096); err != nil {
		t.Fatal(err)
	}
}

func flushImage(t *testing.T, im *qcow2.Image) {
	t.Helper()
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
}

// sharedClusters returns an image whose first clusters are shared with a
// snapshot, and whose L2 table is not.
func sharedClusters(t *testing.T, d *storagetest.Disk, o qcow2.Options) *qcow2.Image {
	t.Helper()
	im := openDisk(t, d, o)
	for n := range int64(4) {
		writeCluster(t, im, n)
	}
	if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	writeCluster(t, im, 0) // copies the L2 table
	for range 3 {          // the copies, then the refcounts that they let fall
		flushImage(t, im)
	}
	return im
}

func TestCopiedClusterIsDurableFirst(t *testing.T) {
	d := newDisk(t, 16<<20, qcow2.CreateOptions{})
	im := sharedClusters(t, d, qcow2.Options{})
	writeCluster(t, im, 1)
	log := d.Record()
	flushImage(t, im)
	wantSyncFirst(t, "copy on write", d, log.Events())
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestReusedClusterIsDurableFirst writes to a cluster that was used before,
// while a pass makes its refcount durable.
func TestReusedClusterIsDurableFirst(t *testing.T) {
	d := newDisk(t, 16<<20, qcow2.CreateOptions{})
	im := openDisk(t, d, qcow2.Options{})
	writeCluster(t, im, 0)
	flushImage(t, im)
	if err := im.Discard(0, orderCluster); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the removal, then the refcount
		flushImage(t, im)
	}
	held, release, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	d.SetHook(func(op storagetest.Op, off int64) {
		if op&(storagetest.OpWrite|storagetest.OpWritev) != 0 {
			d.SetHook(nil)
			close(held)
			<-release
		}
	})
	go func() { // ends when released
		_, err := im.WriteAt(fill(4096, 1), 1*orderCluster+4096)
		done <- err
	}()
	<-held
	flushImage(t, im)
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	log := d.Record()
	flushImage(t, im)
	wantSyncFirst(t, "reuse", d, log.Events())
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestGrowthIsDurableFirst fills an image: no entry is written before the file
// is known to be long enough for its cluster.
func TestGrowthIsDurableFirst(t *testing.T) {
	d := newDisk(t, 64<<20, qcow2.CreateOptions{})
	im := openDisk(t, d, qcow2.Options{})
	writeCluster(t, im, 0)
	flushImage(t, im)
	l2 := l2Table(t, d) / orderCluster
	alone := 0
	for n := int64(1); n < 400; n++ {
		log := d.Record()
		writeCluster(t, im, n)
		flushImage(t, im)
		grown, durable, refcounts := false, true, false
		for _, e := range log.Events() {
			switch {
			case e.Op == storagetest.OpTruncate:
				grown, durable = true, false
			case e.Op == storagetest.OpSync:
				durable = true
			case e.Off/orderCluster == l2 && !durable:
				t.Fatalf("cluster %d: its entry is written before the growth of the file is durable", n)
			case e.Off/orderCluster == 2: // the first refcount block
				refcounts = true
			}
		}
		if grown && !refcounts {
			alone++
		}
	}
	if alone == 0 {
		t.Error("the file never grew without a refcount that rose: nothing was tested")
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestPredecessorsDataIsDurableFirst takes an image over that was copied on
// write to, and not flushed.
func TestPredecessorsDataIsDurableFirst(t *testing.T) {
	s := serve(t, newDisk(t, 16<<20, qcow2.CreateOptions{}), filepath.Join(t.TempDir(), "arena"))
	if err := s.im.Close(); err != nil {
		t.Fatal(err)
	}
	s.disk.Reopen()
	s.im = sharedClusters(t, s.disk, qcow2.Options{Cache: s.cache, ID: servedID})
	writeCluster(t, s.im, 1)
	disk, arena := s.killed()
	log := disk.Record()
	if s = serve(t, disk, arena); s.err != nil {
		t.Fatal(s.err)
	}
	wantSyncFirst(t, "takeover", disk, log.Events())
}
