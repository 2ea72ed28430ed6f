package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

func TestGroup(t *testing.T) {
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{Cache: newCache(t)})
	a, b, c := create(t, p, "a", Source{}), create(t, p, "b", Source{}), create(t, p, "c", Source{})
	write(t, p, a.ID, 0, 1, 4096)
	write(t, p, b.ID, 0, 2, 4096)
	g, err := p.CreateGroup(t.Context(), "g", []string{b.ID, a.ID}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(g.Snapshots) != 2 || g.Name != "g" || g.Created.IsZero() {
		t.Fatalf("got %+v", g)
	}
	if again, err := p.CreateGroup(t.Context(), "g", []string{a.ID, b.ID}, nil); err != nil || again.ID != g.ID || !again.Created.Equal(g.Created) {
		t.Errorf("again: got %+v, %v, want %+v", again, err, g)
	}
	for _, s := range g.Snapshots {
		if got, err := p.GetSnapshot(s.ID); err != nil || got != s || s.Group != g.ID {
			t.Errorf("snapshot %s: got %+v, %v, want %+v", s.ID, got, err, s)
		}
		if err := p.DeleteSnapshot(t.Context(), s.ID); !errors.Is(err, ErrInvalid) {
			t.Errorf("delete a member: got %v, want ErrInvalid", err)
		}
	}
	for _, bad := range []struct {
		name    string
		volumes []string
		want    error
	}{
		{"g", []string{a.ID, b.ID, c.ID}, ErrIncompatible}, {"g", []string{a.ID}, ErrIncompatible}, {"h", nil, ErrInvalid},
		{"h", []string{a.ID, a.ID}, ErrInvalid}, {"h", []string{a.ID, "vol"}, ErrNotFound}, {"", []string{a.ID}, ErrInvalid},
	} {
		if _, err := p.CreateGroup(t.Context(), bad.name, bad.volumes, nil); !errors.Is(err, bad.want) {
			t.Errorf("group %q of %q: got %v, want %v", bad.name, bad.volumes, err, bad.want)
		}
	}

	// A clone of a member outlives the group, and a group of the same name can follow.
	r := create(t, p, "r", Source{Snapshot: g.Snapshots[0].ID})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{Cache: newCache(t)})
	if got, err := p.GetGroup(g.ID); err != nil || len(got.Snapshots) != 2 {
		t.Fatalf("after a restart: got %+v, %v", got, err)
	}
	if err := p.DeleteGroup(t.Context(), g.ID); err != nil {
		t.Fatal(err)
	}
	reap(t, p)
	if _, err := p.GetGroup(g.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleted: got %v, want ErrNotFound", err)
	}
	if err := p.DeleteGroup(t.Context(), g.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("delete again: got %v, want ErrNotFound", err)
	}
	if all, _, _ := p.ListSnapshots(SnapshotFilter{}, "", 0); len(all) != 0 {
		t.Errorf("snapshots left: %+v", all)
	}
	want := byte(1)
	if g.Snapshots[0].Volume == b.ID {
		want = 2
	}
	wantBytes(t, p, r.ID, 0, want, 4096)
	next, err := p.CreateGroup(t.Context(), "g", []string{a.ID, b.ID}, nil)
	if err != nil || next.ID == g.ID {
		t.Errorf("the name again: got %+v, %v", next, err)
	}
	if err := p.DeleteGroup(t.Context(), next.ID); err != nil {
		t.Fatal(err)
	}
	remove(t, p, r.ID, a.ID, b.ID, c.ID)
	reap(t, p)
	if all := files(t, dir); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
}

// A group that cannot be quiesced, or one of whose images fails, leaves nothing.
func TestGroupAllOrNothing(t *testing.T) {
	broken := errors.New("broken")
	p := newPool(t)
	a, b := create(t, p, "a", Source{}), create(t, p, "b", Source{})
	for name, quiesce := range map[string]Quiesce{
		"before the cut": func(context.Context, func()) error { return broken },
		"after the cut":  func(_ context.Context, cut func()) error { cut(); return broken },
	} {
		if _, err := p.CreateGroup(t.Context(), "g", []string{a.ID, b.ID}, quiesce); !errors.Is(err, broken) {
			t.Errorf("%s: got %v, want %v", name, err, broken)
		}
		if _, err := p.CreateSnapshotQuiesced(t.Context(), "s", a.ID, quiesce); !errors.Is(err, broken) {
			t.Errorf("%s: snapshot: got %v, want %v", name, err, broken)
		}
	}
	if _, err := p.CreateSnapshotQuiesced(t.Context(), "s", a.ID, func(context.Context, func()) error { return nil }); err == nil {
		t.Error("a snapshot without a cut succeeds")
	}
	reap(t, p)
	for _, id := range []string{a.ID, b.ID} {
		d := open(t, p, id)
		if all := d.Image.Snapshots(); len(all) > 0 {
			t.Errorf("snapshots left in %s: %+v", id, all)
		}
		d.Close()
	}
	if all := files(t, p.Path()); len(all) != 10 {
		t.Errorf("left besides two volumes: %q", all)
	}
}

// A writer that goes from volume to volume with a growing number finds, in the
// snapshots of a group, numbers without a gap: no volume shows a write that
// came after one that another volume does not show.
func TestGroupIsOfOneMoment(t *testing.T) {
	const volumes, rounds = 3, 6
	p := newPool(t)
	var ids []string
	var images []*qcow2.Image
	for _, name := range []string{"a", "b", "c"} {
		ids = append(ids, create(t, p, name, Source{}).ID)
		images = append(images, open(t, p, ids[len(ids)-1]).Image)
	}
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() { // ends when stop is closed
		var sector [512]byte
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			binary.BigEndian.PutUint64(sector[:], n)
			// Round after round, each write to a place of its own on the volume.
			off := int64(n/volumes%8000) * 512
			if _, err := images[n%volumes].WriteAt(sector[:], off); err != nil {
				t.Error(err)
				return
			}
			if _, err := images[n%volumes].WriteAt(sector[:], 7<<20); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var groups []Group
	for i := range rounds {
		g, err := p.CreateGroup(t.Context(), string(rune('p'+i)), ids, nil)
		if err != nil {
			t.Error(err)
			break
		}
		groups = append(groups, g)
	}
	close(stop)
	writer.Wait()
	for _, g := range groups {
		var last []uint64
		for _, s := range g.Snapshots {
			v, err := p.Create(t.Context(), CreateRequest{Name: s.ID, Params: DefaultParams(), Source: Source{Snapshot: s.ID}})
			if err != nil {
				t.Fatal(err)
			}
			d := open(t, p, v.ID)
			var sector [512]byte
			if _, err := d.Image.ReadAt(sector[:], 7<<20); err != nil {
				t.Fatal(err)
			}
			last = append(last, binary.BigEndian.Uint64(sector[:]))
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
		}
		// The last complete writes to three volumes are three numbers in a row, in
		// some order; the first numbers may be missing still.
		low, high := last[0], last[0]
		for _, n := range last {
			low, high = min(low, n), max(high, n)
		}
		if high-low != volumes-1 && high >= volumes {
			t.Errorf("group %s: last numbers %v, want %d in a row", g.Name, last, volumes)
		}
	}
}

// The members of a group whose record is damaged are kept, and it is reported.
func TestDamagedGroupIsKept(t *testing.T) {
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{})
	a := create(t, p, "a", Source{})
	g, err := p.CreateGroup(t.Context(), "g", []string{a.ID}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, groupRecName(g.ID)), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{})
	defer p.Close()
	reap(t, p)
	if _, err := p.GetGroup(g.ID); !errors.Is(err, ErrDamaged) {
		t.Errorf("got %v, want ErrDamaged", err)
	}
	if _, err := p.GetSnapshot(g.Snapshots[0].ID); err != nil {
		t.Error(err)
	}
	remove(t, p, g.Snapshots[0].ID)
	reap(t, p)
}

// A member of a deleted group whose record could not be read stays deleted when it is
// mended.
func TestDeletedMemberIsMended(t *testing.T) {
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{})
	a, b := create(t, p, "a", Source{}), create(t, p, "b", Source{})
	g, err := p.CreateGroup(t.Context(), "g", []string{a.ID, b.ID}, nil)
	if err := errors.Join(err, p.Close()); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, snapshotRecName(g.Snapshots[1].Volume, g.Snapshots[1].ID))
	good, err := os.ReadFile(name)
	if err := errors.Join(err, os.WriteFile(name, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{})
	if err := p.DeleteGroup(t.Context(), g.ID); err != nil {
		t.Fatal(err)
	}
	reap(t, p)
	if err := errors.Join(p.Close(), os.WriteFile(name, good, 0o600)); err != nil {
		t.Fatal(err)
	}
	p = newPoolIn(t, dir)
	if all, _, err := p.ListSnapshots(SnapshotFilter{}, "", 0); err != nil || len(all) > 0 {
		t.Errorf("snapshots that are there again: %+v, %v", all, err)
	}
	remove(t, p, a.ID, b.ID)
	reap(t, p)
	if left := files(t, dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
