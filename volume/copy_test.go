package volume

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// clone makes a clone of source with the mode.
func clone(t *testing.T, p *Pool, name string, source Source, mode CloneMode) Volume {
	t.Helper()
	q := DefaultParams()
	q.CloneMode = mode
	v, err := p.Create(t.Context(), CreateRequest{Name: name, Params: q, Source: source})
	if err != nil {
		t.Fatalf("clone %q: %v", name, err)
	}
	return v
}

func copyAll(t *testing.T, p *Pool) {
	t.Helper()
	if left, err := p.CopyAll(t.Context()); err != nil || left {
		t.Fatalf("copy: left %v, %v", left, err)
	}
}

func wantIndependent(t *testing.T, p *Pool, id string, want bool) {
	t.Helper()
	if got := qemutest.GetInfo(t, imagePath(p, id)).BackingFilename == ""; got != want {
		t.Errorf("volume %s is independent: got %v, want %v", id, got, want)
	}
	v, err := p.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if v.Copy.Pending == want {
		t.Errorf("copy of %s: got %+v, want pending %v", id, v.Copy, !want)
	}
}

// A copy is usable at once, also while it is attached and being copied, and
// outlives its source, which holds nothing for it then.
func TestCopy(t *testing.T) {
	const n = 1 << 20
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	write(t, p, a.ID, 4*n, 2, n)
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	write(t, p, a.ID, 0, 9, n)
	wantBytes(t, p, c.ID, 0, 1, n)
	wantIndependent(t, p, c.ID, false)
	if all := p.Copies(); len(all) != 1 || all[0].Volume != c.ID || all[0].Size != c.Size {
		t.Errorf("copies: got %+v", all)
	}

	d := open(t, p, c.ID) // attached, and stays so
	if _, err := d.Image.WriteAt([]byte{7}, 4*n); err != nil {
		t.Fatal(err)
	}
	copyAll(t, p)
	wantIndependent(t, p, c.ID, true)
	if v, _ := p.Get(c.ID); v.Copy.Done != v.Size || v.Copy.Copied == 0 || v.Copy.Copied > 2*n {
		t.Errorf("copy: got %+v of %d bytes", v.Copy, v.Size)
	}
	reap(t, p)
	remove(t, p, a.ID)
	reap(t, p)
	if _, err := os.Stat(imagePath(p, a.ID)); !os.IsNotExist(err) {
		t.Errorf("the source is still there: %v", err)
	}
	wantBytes(t, p, c.ID, 0, 1, n)
	wantBytes(t, p, c.ID, 4*n, 7, 1)
	wantBytes(t, p, c.ID, 4*n+1, 2, n-1)
	wantBytes(t, p, c.ID, 5*n, 0, n)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	wantQEMU(t, imagePath(p, c.ID), 4*n+4096, 2, n-4096)
}

// A snapshot taken before a copy is complete holds the source until it is deleted.
func TestCopyWaitsForSnapshots(t *testing.T) {
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 1<<20)
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	early := snapshot(t, p, "early", c.ID)
	copyAll(t, p)
	late := snapshot(t, p, "late", c.ID)
	wantIndependent(t, p, c.ID, false)
	if all := p.Copies(); len(all) != 1 || !all[0].Waiting || all[0].Done != c.Size {
		t.Errorf("copies: got %+v", all)
	}
	r := create(t, p, "r", Source{Snapshot: early.ID})
	wantBytes(t, p, r.ID, 0, 1, 1<<20)
	remove(t, p, r.ID, early.ID)
	reap(t, p)
	copyAll(t, p)
	wantIndependent(t, p, c.ID, true)
	remove(t, p, a.ID)
	reap(t, p)
	r = create(t, p, "r", Source{Snapshot: late.ID})
	wantBytes(t, p, r.ID, 0, 1, 1<<20)
}

// A copy under way neither keeps its volume from being deleted nor holds anything
// of it open afterwards.
func TestDeleteWhileCopying(t *testing.T) {
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{Cache: newCache(t), CopyBandwidth: 1})
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 2<<20)
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	ended := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { p.Run(ctx); close(ended) }() // ends with ctx
	for deadline := time.Now().Add(5 * time.Minute); !p.images.inUse(c.ID); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the copy has not begun")
		}
	}
	remove(t, p, c.ID, a.ID)
	cancel()
	<-ended
	reap(t, p)
	if all := files(t, dir); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

// An image that was opened while its header named a view reads from the view
// still: the snapshot goes when the image is closed, not before.
func TestCopyLeavesOpenViews(t *testing.T) {
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 1<<20)
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	hidden := p.makeID(kindHidden, c.ID, 0)
	view, err := p.openBacking(t.Context(), p.backingName(viewRef{a.ID, hidden}), "qcow2")
	if err != nil {
		t.Fatal(err)
	}
	copyAll(t, p)
	wantIndependent(t, p, c.ID, true)
	reap(t, p)
	if !hasSnapshot(t, p, a.ID, hidden) {
		t.Error("the snapshot is gone while its view is open")
	}
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	reap(t, p)
	if hasSnapshot(t, p, a.ID, hidden) {
		t.Error("the snapshot is left")
	}
	if _, err := p.openBacking(t.Context(), p.backingName(viewRef{a.ID, hidden}), "qcow2"); err == nil {
		t.Error("the view of a removed snapshot opens")
	}
}

func hasSnapshot(t *testing.T, p *Pool, id, name string) bool {
	t.Helper()
	d := open(t, p, id)
	defer d.Close()
	for _, s := range d.Image.Snapshots() {
		if s.Name == name {
			return true
		}
	}
	return false
}

// What a view is being removed of cannot be opened.
func TestGoingViewDoesNotOpen(t *testing.T) {
	p := newPool(t)
	a := create(t, p, "a", Source{})
	s := snapshot(t, p, "s", a.ID)
	remove(t, p, s.ID)
	w, settle := p.claimWaste(p.find(a.ID))
	if len(w.snapshots) != 1 {
		t.Fatalf("waste: got %+v", w)
	}
	if _, err := p.openBacking(t.Context(), p.backingName(viewRef{a.ID, s.ID}), "qcow2"); !errors.Is(err, ErrBusy) {
		t.Errorf("got %v, want ErrBusy", err)
	}
	settle()
}

func TestPacer(t *testing.T) {
	begin := time.Unix(1000, 0)
	c := pacer{rate: 4 << 20, begin: begin, bytes: 6 << 20}
	if got, want := c.due(), begin.Add(1500*time.Millisecond); !got.Equal(want) {
		t.Errorf("6 MiB at 4 MiB/s: got %v, want %v", got, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c = pacer{rate: 1, begin: time.Now()}
	if err := c.wait(ctx, 1<<40); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// A CopyAll whose caller has left goes on: the next one passes over its volume.
func TestCopyBeginsOnce(t *testing.T) {
	p := newPool(t)
	a := create(t, p, "a", Source{})
	c := clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	e := p.beginCopy(c.ID, func() {})
	if e == nil {
		t.Fatal("the copy does not begin")
	}
	if p.beginCopy(c.ID, func() {}) != nil {
		t.Error("a copy begins while it is under way")
	}
	p.mu.Lock()
	e.copy.cancel = nil
	p.mu.Unlock()
	copyAll(t, p)
	wantIndependent(t, p, c.ID, true)
}

// Stock QEMU reads a clone of a snapshot of a volume that has been copied since, also
// when what that was made from is gone.
func TestViewOfCopiedVolume(t *testing.T) {
	const n = 1 << 20
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 8*n)
	b := clone(t, p, "b", Source{Volume: a.ID}, CloneCopy)
	s0 := snapshot(t, p, "s0", b.ID) // it shows the source: the link stays
	copyAll(t, p)
	s1 := snapshot(t, p, "s1", b.ID)
	c := create(t, p, "c", Source{Snapshot: s1.ID})
	remove(t, p, s0.ID)
	reap(t, p)
	copyAll(t, p)
	wantIndependent(t, p, b.ID, true)
	remove(t, p, a.ID)
	reap(t, p)
	wantBytes(t, p, c.ID, 0, 1, 8*n)
	wantQEMU(t, imagePath(p, c.ID), 0, 1, 8*n)
}

// A readHook calls hook when off is read.
type readHook struct {
	qcow2.File
	off  *atomic.Int64
	hook func()
}

func (f readHook) ReadAt(b []byte, off int64) (int, error) {
	if off != 0 && off == f.off.Load() {
		f.hook()
	}
	return f.File.ReadAt(b, off)
}

// A snapshot that goes when the copier has just looked at it makes it look again.
func TestCopyAfterASnapshotThatGoes(t *testing.T) {
	const n = 1 << 20
	var table atomic.Int64 // of the snapshot, in the image
	var p *Pool
	var c Volume
	hook := func() { p.retryCopy(p.find(c.ID)) } // as removeSnapshots does
	p = openPool(t, storagetest.MemoryDir(t), Options{wrapFile: func(f qcow2.File) qcow2.File { return readHook{f, &table, hook} }})
	defer p.Close()
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	c = clone(t, p, "c", Source{Volume: a.ID}, CloneCopy)
	s := snapshot(t, p, "s", c.ID)
	d := open(t, p, c.ID)
	off, _, err := d.Image.L1TableOf(s.ID)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	table.Store(int64(off))
	copyAll(t, p)
	if all := p.Copies(); len(all) != 1 || all[0].Waiting {
		t.Errorf("got %+v, want one that is tried again", all)
	}
	table.Store(0)
	copyAll(t, p)
	if all := p.Copies(); len(all) != 1 || !all[0].Waiting {
		t.Errorf("got %+v, want one that waits for its snapshot", all)
	}
	remove(t, p, s.ID)
	reap(t, p)
	copyAll(t, p)
	wantIndependent(t, p, c.ID, true)
}
