package qcow2

import (
	"bytes"
	"runtime"
	"strings"
	"testing"
	"time"

	"csi-qcow2/internal/storagetest"
)

// reclaimImage returns an image of small clusters that gives space back, in a
// simulated file, with nothing dirty in the cache.
func reclaimImage(t *testing.T) (*Image, *storagetest.Disk) {
	t.Helper()
	d := storagetest.NewDisk()
	if err := Create(t.Context(), d, 1<<20, CreateOptions{ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), d, Options{PassDiscard: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im, d
}

// awaitBlocked waits until n goroutines that are in fn wait for a mutex.
func awaitBlocked(t *testing.T, fn string, n int) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for deadline := time.Now().Add(time.Minute); ; runtime.Gosched() {
		blocked := 0
		for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
			if head, _, _ := strings.Cut(g, "\n"); strings.Contains(head, "Mutex.Lock") && strings.Contains(g, fn) {
				blocked++
			}
		}
		switch {
		case blocked >= n:
			return
		case time.Now().After(deadline):
			t.Fatalf("%d goroutines wait for a mutex in %s, want %d", blocked, fn, n)
		}
	}
}

// TestReclaimSeesPackedData frees the last compressed data of a host cluster while
// more of it is put there.
func TestReclaimSeesPackedData(t *testing.T) {
	im, d := reclaimImage(t)
	if err := im.WriteCompressed(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.handle.WriteBack(); err != nil {
		t.Fatal(err)
	}
	pk := &im.packer
	pk.mu.Lock()
	reclaimed := make(chan error)
	go func() { reclaimed <- im.reclaim() }()
	awaitBlocked(t, "reclaimRun", 1)
	// As allocBytes and writePacked.
	at, c := pk.next, im.geo.hostCluster(pk.next)
	if at == 0 || c == 0 {
		t.Fatal("no cluster is being filled")
	}
	if err := im.addRefcounts(c, 1, 1); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{2}, 100)
	if _, err := d.WriteAt(want, int64(at)); err != nil {
		t.Fatal(err)
	}
	pk.advance(&im.geo, at, int64(len(want)))
	pk.mu.Unlock()
	if err := <-reclaimed; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, int64(at)); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the new compressed data was punched out (%v)", err)
	}
	if n, err := im.refcount(c); err != nil || n != 1 {
		t.Errorf("refcount %d, want 1 (%v)", n, err)
	}
	if err := im.lower(run{c, 1}, false); err != nil {
		t.Fatal(err)
	}
}

// TestLastReferenceIsSeen gives up both references to a cluster at once, that of
// the active state and that of a snapshot: one of the two is the last.
func TestLastReferenceIsSeen(t *testing.T) {
	im, d := reclaimImage(t)
	data := bytes.Repeat([]byte{1}, 4096)
	if _, err := im.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	m, err := im.lookup(im.l1.Load(), 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	c := im.geo.hostCluster(m.host)
	if err := im.addRefcounts(c, 1, 1); err != nil { // as of a snapshot
		t.Fatal(err)
	}
	if err := im.Discard(0, 4096); err != nil {
		t.Fatal(err)
	}
	if err := im.handle.WriteBack(); err != nil {
		t.Fatal(err)
	}
	block, index := im.geo.refblockIndex(c)
	off, _, _, _ := im.geo.refcountSlice(HostOffset(im.allocator.table()[block]), index)
	lock := im.allocator.refcountLock(&im.geo, off)
	lock.Lock()
	done := make(chan error)
	go func() { done <- im.lower(run{c, 1}, false) }()
	awaitBlocked(t, "lower", 1)
	go func() { done <- im.reclaimInTurn() }()
	awaitBlocked(t, "qcow2.(*Image).", 2)
	lock.Unlock()
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if n, err := im.refcount(c); err != nil || n != 0 {
		t.Errorf("refcount %d, want 0 (%v)", n, err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, int64(m.host)); err != nil || !bytes.Equal(got, make([]byte, 4096)) {
		t.Errorf("the space of the cluster was not given back (%v)", err)
	}
	if freed := im.allocator.freed; len(freed) == 0 || freed[len(freed)-1] != (run{c, 1}) {
		t.Errorf("the cluster is not available: %v", freed)
	}
}

// TestTableIsFixedBeforeItsEntries looks at the L1 entry whenever COPIED flags of
// its table are about to be set: a write that still took the table for a shared one
// would copy it then, without the flags.
func TestTableIsFixedBeforeItsEntries(t *testing.T) {
	im, d := reclaimImage(t)
	if _, err := im.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := im.CreateSnapshot(t.Context(), Snapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	table := int64(im.l1.Load().load(0).offset())
	im.handle.Drop(table) // so that it is read
	looks := 0
	d.SetHook(func(op storagetest.Op, off int64) {
		if op != storagetest.OpRead || off != table {
			return
		}
		looks++
		if n, err := im.refcount(im.geo.hostCluster(HostOffset(table))); err != nil || (n == 1) != im.l1.Load().load(0).copied() {
			t.Errorf("refcount %d of the table, COPIED %t (%v)", n, im.l1.Load().load(0).copied(), err)
		}
	})
	defer d.SetHook(nil)
	if err := im.fixCopied(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := im.addRefcounts(im.geo.hostCluster(HostOffset(table)), 1, -1); err != nil { // as when the snapshot goes
		t.Fatal(err)
	}
	im.handle.Drop(table)
	if err := im.fixCopied(t.Context()); err != nil {
		t.Fatal(err)
	}
	if looks != 2 {
		t.Errorf("the table was read %d times, want 2", looks)
	}
	if err := im.addRefcounts(im.geo.hostCluster(HostOffset(table)), 1, 1); err != nil {
		t.Fatal(err)
	}
}
