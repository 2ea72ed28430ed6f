package volume

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/qemutest"
)

// A family is volumes and snapshots that depend on each other:
//
//	a ─ s1 ─ restored
//	│ └ (hidden) ─ cloned ─ s2 ─ grandchild
type family struct {
	ids  map[string]string // by name
	want map[string]byte   // content of the first MiB, by name of a volume
}

func newFamily(t *testing.T, p *Pool, suffix string) family {
	t.Helper()
	f := family{ids: make(map[string]string), want: map[string]byte{"a": 2, "restored": 1, "cloned": 3, "grandchild": 4}}
	const n = 1 << 20
	a := create(t, p, "a"+suffix, Source{})
	write(t, p, a.ID, 0, 1, n)
	write(t, p, a.ID, n, 0x55, n)
	s1 := snapshot(t, p, "s1"+suffix, a.ID)
	restored := create(t, p, "restored"+suffix, Source{Snapshot: s1.ID})
	write(t, p, a.ID, 0, 2, n)
	cloned := create(t, p, "cloned"+suffix, Source{Volume: a.ID})
	write(t, p, cloned.ID, 0, 4, n)
	s2 := snapshot(t, p, "s2"+suffix, cloned.ID)
	grandchild := create(t, p, "grandchild"+suffix, Source{Snapshot: s2.ID})
	write(t, p, cloned.ID, 0, 3, n)
	f.ids = map[string]string{"a": a.ID, "s1": s1.ID, "restored": restored.ID, "cloned": cloned.ID, "s2": s2.ID, "grandchild": grandchild.ID}
	return f
}

// check reads what is left of the family, with this package and with QEMU.
func (f family) check(t *testing.T, p *Pool) {
	t.Helper()
	for name, b := range f.want {
		id, left := f.ids[name]
		if !left {
			continue
		}
		wantBytes(t, p, id, 0, b, 1<<20)
		wantBytes(t, p, id, 1<<20, 0x55, 1<<20)
		wantQEMU(t, imagePath(p, id), 0, b, 1<<20)
		wantQEMU(t, imagePath(p, id), 1<<20, 0x55, 1<<20)
		qemutest.Check(t, imagePath(p, id))
	}
}

// TestDeleteInEveryOrder deletes a family in random orders. What is left stays
// readable at every step, what nothing needs goes, and at the end all is gone.
func TestDeleteInEveryOrder(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	p := newPool(t)
	names := []string{"a", "s1", "restored", "cloned", "s2", "grandchild"}
	for round := range 12 {
		f := newFamily(t, p, itoa(int64(round)))
		random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		for i, name := range names {
			id := f.ids[name]
			remove(t, p, id)
			delete(f.ids, name)
			if i%2 == round%2 { // the reaper comes at any time
				reap(t, p)
			}
			if _, err := p.Get(id); !errors.Is(err, ErrNotFound) {
				t.Fatalf("order %v: %s is still there: %v", names, name, err)
			}
			f.check(t, p)
		}
		reap(t, p)
		if left := files(t, p.Path()); len(left) > 0 {
			t.Fatalf("order %v left %q", names, left)
		}
	}
}

// TestDeleteGivesSpaceBack: what a deleted snapshot held goes back to the host.
func TestDeleteGivesSpaceBack(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 8<<20)
	before := allocated(t, imagePath(p, v.ID))
	s := snapshot(t, p, "s", v.ID)
	write(t, p, v.ID, 0, 2, 8<<20)
	full := allocated(t, imagePath(p, v.ID))
	if full < before+8<<20 {
		t.Fatalf("with a snapshot the image takes %d bytes, %d before", full, before)
	}
	remove(t, p, s.ID)
	reap(t, p)
	if got := allocated(t, imagePath(p, v.ID)); got > before+1<<20 {
		t.Fatalf("after the snapshot is gone the image takes %d bytes, %d before it", got, before)
	}
}

// TestDeleteFromFullPool: where not even a record can be written, a volume that
// nobody needs can be deleted, and room is there again.
func TestDeleteFromFullPool(t *testing.T) {
	dir := newFilesystem(t, "ext4", "-m", "0")
	p := newPoolIn(t, dir)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 1<<20)
	source := create(t, p, "source", Source{})
	clone(t, p, "clone", Source{Volume: source.ID}, CloneLinked)
	fill(t, filepath.Join(filepath.Dir(dir), "ballast"))

	if err := p.Delete(t.Context(), source.ID); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("delete the source of a clone in a full pool: %v, want %v: it needs a tombstone", err, unix.ENOSPC)
	}
	if err := p.Delete(t.Context(), v.ID); err != nil {
		t.Fatalf("delete a volume in a full pool: %v", err)
	}
	if _, err := p.Get(v.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("get a deleted volume: %v, want %v", err, ErrNotFound)
	}
	if err := p.Delete(t.Context(), source.ID); err != nil {
		t.Errorf("delete the source of a clone when there is room: %v", err)
	}
}

// fill writes a file until its filesystem has no block left.
func fill(t *testing.T, name string) {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size >= 512; size /= 2 {
		for err == nil {
			if _, err = f.Write(make([]byte, size)); err == nil {
				err = f.Sync()
			}
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
}

// TestReaperRuns: nobody calls Reap, and all goes.
func TestReaperRuns(t *testing.T) {
	p := newPool(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { // ends with ctx
		p.Run(ctx)
		close(ended)
	}()
	f := newFamily(t, p, "")
	for _, name := range []string{"a", "s1", "s2", "cloned", "grandchild", "restored"} {
		remove(t, p, f.ids[name])
	}
	limit := time.Now().Add(5 * time.Minute)
	for len(files(t, p.Path())) > 0 {
		if time.Now().After(limit) {
			t.Fatalf("left: %q", files(t, p.Path()))
		}
		time.Sleep(time.Millisecond)
	}
	stop()
	<-ended
}

// TestDeleteIsKeptAcrossRestart: tombstones stay hidden and are reaped later.
func TestDeleteIsKeptAcrossRestart(t *testing.T) {
	dir := t.TempDir()
	p := openPool(t, dir, Options{})
	f := newFamily(t, p, "")
	for _, name := range []string{"a", "s1", "cloned"} {
		remove(t, p, f.ids[name])
		delete(f.ids, name)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{})
	defer p.Close()
	volumes, _, err := p.List("", 0)
	if err != nil || len(volumes) != 2 {
		t.Fatalf("volumes: %v, %v", volumes, err)
	}
	snapshots, _, err := p.ListSnapshots(SnapshotFilter{}, "", 0)
	if err != nil || len(snapshots) != 1 || snapshots[0].Name != "s2" {
		t.Fatalf("snapshots: %v, %v", snapshots, err)
	}
	reap(t, p)
	f.check(t, p)
	for _, name := range []string{"restored", "s2", "grandchild"} {
		remove(t, p, f.ids[name])
	}
	reap(t, p)
	if left := files(t, dir); len(left) > 0 {
		t.Fatalf("left %q", left)
	}
}

// TestOneOperationAtATime: operations on one volume exclude each other, and the
// storm ends in a state that adds up.
func TestOneOperationAtATime(t *testing.T) {
	p := newPool(t)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { // ends with ctx
		p.Run(ctx)
		close(ended)
	}()
	const workers = 8
	done := make(chan error, workers)
	for w := range workers {
		go func() { done <- storm(t.Context(), p, uint64(w)) }() // ends after its operations
	}
	for range workers {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	stop()
	<-ended
	for {
		volumes, _, _ := p.List("", 0)
		snapshots, _, _ := p.ListSnapshots(SnapshotFilter{}, "", 0)
		if len(volumes)+len(snapshots) == 0 {
			break
		}
		for _, v := range volumes {
			wantQEMU(t, imagePath(p, v.ID), 0, byte(0), 512)
			remove(t, p, v.ID)
		}
		for _, s := range snapshots {
			remove(t, p, s.ID)
		}
	}
	reap(t, p)
	if left := files(t, p.Path()); len(left) > 0 {
		t.Fatalf("left %q", left)
	}
}

// storm runs random operations on a few names. Only the errors that concurrent
// callers must expect are accepted.
func storm(ctx context.Context, p *Pool, seed uint64) error {
	random := rand.New(rand.NewPCG(seed, 1))
	for range 60 {
		name := fmt.Sprint(random.IntN(4))
		id, _ := p.VolumeNamed(name)
		snap, _ := p.SnapshotNamed(name)
		var err error
		switch random.IntN(6) {
		case 0:
			_, err = p.Create(ctx, CreateRequest{Name: name, Size: SizeRange{Required: 1 << 20}, Params: DefaultParams()})
		case 1:
			_, err = p.Create(ctx, CreateRequest{Name: name + "c", Params: DefaultParams(), Source: Source{Volume: id}})
			if id == "" {
				err = nil // the source is empty then: an ordinary volume
			}
		case 2:
			_, err = p.CreateSnapshot(ctx, name, id)
		case 3:
			err = p.Delete(ctx, id)
		case 4:
			err = p.DeleteSnapshot(ctx, snap)
		case 5:
			_, err = p.Expand(ctx, id, SizeRange{Required: int64(random.IntN(8)+1) << 20})
		}
		if err != nil && !errors.Is(err, ErrBusy) && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrIncompatible) &&
			!errors.Is(err, ErrInUse) && !errors.Is(err, ErrTooDeep) {
			return err
		}
	}
	return nil
}
