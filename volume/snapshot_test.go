package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"csi-qcow2/internal/qemutest"
)

func imagePath(p *Pool, id string) string { return filepath.Join(p.Path(), volumeDir(id), diskName) }

// wantQEMU checks that stock qemu-io reads n bytes of b at off.
func wantQEMU(t *testing.T, path string, off int64, b byte, n int) {
	t.Helper()
	qemutest.IO(t, path, "read -P "+itoa(int64(b))+" "+itoa(off)+" "+itoa(int64(n)))
}

func TestSnapshotIsIdempotent(t *testing.T) {
	p := newPool(t)
	v, w := create(t, p, "v", Source{}), create(t, p, "w", Source{})
	a, b := snapshot(t, p, "s", v.ID), snapshot(t, p, "s", v.ID)
	if a != b {
		t.Fatalf("second snapshot: got %+v, want %+v", b, a)
	}
	if _, err := p.CreateSnapshot(t.Context(), "s", w.ID); !errors.Is(err, ErrIncompatible) {
		t.Fatalf("same name of another volume: %v", err)
	}
	if _, err := p.CreateSnapshot(t.Context(), "x", "vol-x"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("unknown volume: %v", err)
	}
	if got, err := p.GetSnapshot(a.ID); err != nil || got != a {
		t.Fatalf("get: %+v, %v", got, err)
	}
	remove(t, p, a.ID)
	if _, err := p.GetSnapshot(a.ID); !errors.Is(err, ErrNotFound) {
		t.Fatalf("get after delete: %v", err)
	}
	reap(t, p)
	if got := qemutest.GetInfo(t, imagePath(p, v.ID)).Snapshots; len(got) != 0 {
		t.Fatalf("the image still holds %+v", got)
	}
}

// TestSnapshotNameAgain: a name can be used again before the reaper is done.
func TestSnapshotNameAgain(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 4096)
	first := snapshot(t, p, "s", v.ID)
	clone := create(t, p, "c", Source{Snapshot: first.ID})
	remove(t, p, first.ID)
	write(t, p, v.ID, 0, 2, 4096)
	second := snapshot(t, p, "s", v.ID)
	if second.ID == first.ID {
		t.Fatal("the ID of a tombstone was given again")
	}
	later := create(t, p, "c2", Source{Snapshot: second.ID})
	wantBytes(t, p, clone.ID, 0, 1, 4096)
	wantBytes(t, p, later.ID, 0, 2, 4096)
}

// TestCloneNameAgain: a clone of the same name shows the source as it is now,
// although what the first one was made from has not been reaped.
func TestCloneNameAgain(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 4096)
	first := create(t, p, "c", Source{Volume: v.ID})
	remove(t, p, first.ID)
	write(t, p, v.ID, 0, 2, 4096)
	second := create(t, p, "c", Source{Volume: v.ID})
	if second.ID != first.ID {
		t.Fatalf("the ID changed from %s to %s: the test does not meet the case", first.ID, second.ID)
	}
	wantBytes(t, p, second.ID, 0, 2, 4096)
	wantQEMU(t, imagePath(p, second.ID), 0, 2, 4096)
}

func TestListSnapshots(t *testing.T) {
	p := newPool(t)
	v, w := create(t, p, "v", Source{}), create(t, p, "w", Source{})
	s1, s2, s3 := snapshot(t, p, "1", v.ID), snapshot(t, p, "2", v.ID), snapshot(t, p, "3", w.ID)
	create(t, p, "clone", Source{Volume: v.ID}) // its hidden snapshot is not listed
	for _, c := range []struct {
		filter SnapshotFilter
		want   int
	}{
		{SnapshotFilter{}, 3}, {SnapshotFilter{Volume: v.ID}, 2}, {SnapshotFilter{ID: s3.ID}, 1},
		{SnapshotFilter{ID: s3.ID, Volume: v.ID}, 0}, {SnapshotFilter{ID: "none"}, 0}, {SnapshotFilter{Volume: "none"}, 0},
	} {
		if got, _, err := p.ListSnapshots(c.filter, "", 0); err != nil || len(got) != c.want {
			t.Errorf("%+v: got %d, %v, want %d", c.filter, len(got), err, c.want)
		}
	}
	first, token, err := p.ListSnapshots(SnapshotFilter{}, "", 2)
	if err != nil || len(first) != 2 || token == "" {
		t.Fatalf("first page: %v, %q, %v", first, token, err)
	}
	rest, token, err := p.ListSnapshots(SnapshotFilter{}, token, 0)
	if err != nil || len(rest) != 1 || token != "" {
		t.Fatalf("rest: %v, %q, %v", rest, token, err)
	}
	_, _ = s1, s2
}

// TestCloneIsReadByQEMU checks the promise of view.go on a source that goes on
// being written, discarded, expanded and snapshotted while it is open here.
func TestCloneIsReadByQEMU(t *testing.T) {
	for _, cluster := range []int64{4 << 10, 64 << 10, 2 << 20} {
		p := newPool(t)
		params := DefaultParams()
		params.ClusterSize = cluster
		v, err := p.Create(t.Context(), CreateRequest{Name: "v", Size: SizeRange{Required: 32 << 20}, Params: params})
		if err != nil {
			t.Fatal(err)
		}
		d := open(t, p, v.ID)
		fill := func(off int64, b byte, n int) {
			t.Helper()
			buf := make([]byte, n)
			for i := range buf {
				buf[i] = b
			}
			if _, err := d.Image.WriteAt(buf, off); err != nil {
				t.Fatal(err)
			}
		}
		fill(0, 1, 8<<20)
		s := snapshot(t, p, "s", v.ID)
		fill(0, 2, 4<<20)
		restored, err := p.Create(t.Context(), CreateRequest{Name: "r", Size: SizeRange{Required: 64 << 20}, Params: params, Source: Source{Snapshot: s.ID}})
		if err != nil {
			t.Fatal(err)
		}
		cloned, err := p.Create(t.Context(), CreateRequest{Name: "c", Params: params, Source: Source{Volume: v.ID}})
		if err != nil {
			t.Fatal(err)
		}
		if cloned.Size != v.Size {
			t.Fatalf("clone without a size: got %d, want the source's %d", cloned.Size, v.Size)
		}
		nested, err := p.Create(t.Context(), CreateRequest{Name: "n", Params: params, Source: Source{Volume: restored.ID}})
		if err != nil {
			t.Fatal(err)
		}
		check := func() {
			t.Helper()
			for _, id := range []string{restored.ID, nested.ID} {
				wantQEMU(t, imagePath(p, id), 0, 1, 8<<20)
				wantQEMU(t, imagePath(p, id), 8<<20, 0, 56<<20)
				wantBytes(t, p, id, 0, 1, 8<<20)
				wantBytes(t, p, id, 8<<20, 0, 56<<20)
			}
			wantQEMU(t, imagePath(p, cloned.ID), 0, 2, 4<<20)
			wantQEMU(t, imagePath(p, cloned.ID), 4<<20, 1, 4<<20)
			wantBytes(t, p, cloned.ID, 0, 2, 4<<20)
			wantBytes(t, p, cloned.ID, 4<<20, 1, 4<<20)
		}
		check()
		fill(0, 3, 16<<20)
		if err := d.Image.Discard(1<<20, 6<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: 1 << 30}); err != nil {
			t.Fatal(err)
		}
		other := snapshot(t, p, "other", v.ID)
		fill(900<<20, 4, 8<<20)
		remove(t, p, other.ID)
		reap(t, p)
		check()
		wantQEMU(t, imagePath(p, nested.ID), 0, 1, 4096)
		write(t, p, cloned.ID, 5<<20, 9, 12345) // copy on write out of the view
		wantQEMU(t, imagePath(p, cloned.ID), 5<<20, 9, 12345)
		wantQEMU(t, imagePath(p, cloned.ID), 5<<20+12345, 1, 1<<20)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestDirectIO: volumes that bypass the page cache, and clones between them and
// others.
func TestDirectIO(t *testing.T) {
	p := newPoolIn(t, t.TempDir())
	direct, err := ParseParams(map[string]string{"directIO": "true", "clusterSize": "4096"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ source, clone Params }{{direct, direct}, {direct, DefaultParams()}, {DefaultParams(), direct}} {
		name := fmt.Sprintf("%+v", c)[:100]
		v, err := p.Create(t.Context(), CreateRequest{Name: name, Size: SizeRange{Required: 8 << 20}, Params: c.source})
		if err != nil {
			t.Fatal(err)
		}
		write(t, p, v.ID, 1000, 1, 3<<20)
		clone, err := p.Create(t.Context(), CreateRequest{Name: "clone " + name, Params: c.clone, Source: Source{Volume: v.ID}})
		if err != nil {
			t.Fatal(err)
		}
		write(t, p, v.ID, 1000, 2, 3<<20)
		write(t, p, clone.ID, 5000, 3, 100)
		wantBytes(t, p, clone.ID, 1000, 1, 4000)
		wantBytes(t, p, clone.ID, 5000, 3, 100)
		wantBytes(t, p, clone.ID, 5100, 1, 2<<20)
		wantQEMU(t, imagePath(p, clone.ID), 1000, 1, 4000)
		wantQEMU(t, imagePath(p, clone.ID), 5000, 3, 100)
		remove(t, p, v.ID, clone.ID)
	}
}

// TestCloneWhileOpenSharesView: clones of one snapshot share one open view.
func TestCloneWhileOpenSharesView(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 1<<20)
	s := snapshot(t, p, "s", v.ID)
	a, b := create(t, p, "a", Source{Snapshot: s.ID}), create(t, p, "b", Source{Snapshot: s.ID})
	da, db := open(t, p, a.ID), open(t, p, b.ID)
	if got := len(p.views.keys()); got != 1 {
		t.Fatalf("%d open views, want 1", got)
	}
	if err := da.Close(); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, p, b.ID, 0, 1, 1<<20)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if got := len(p.views.keys()); got != 0 {
		t.Fatalf("%d open views, want 0", got)
	}
}

func TestCloneRefusals(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	s := snapshot(t, p, "s", v.ID)
	for _, c := range []struct {
		req  CreateRequest
		want error
	}{
		{CreateRequest{Name: "c", Size: SizeRange{Required: 4 << 20}, Source: Source{Volume: v.ID}}, ErrOutOfRange},
		{CreateRequest{Name: "c", Size: SizeRange{Limit: 4 << 20}, Source: Source{Snapshot: s.ID}}, ErrOutOfRange},
		{CreateRequest{Name: "c", Source: Source{Volume: "vol-x"}}, ErrNotFound},
		{CreateRequest{Name: "c", Source: Source{Snapshot: "snap-x"}}, ErrNotFound},
		{CreateRequest{Name: "c", Source: Source{Volume: v.ID, Snapshot: s.ID}}, ErrInvalid},
	} {
		c.req.Params = DefaultParams()
		if _, err := p.Create(t.Context(), c.req); !errors.Is(err, c.want) {
			t.Errorf("%+v: got %v, want %v", c.req, err, c.want)
		}
	}
	reap(t, p)
	if got := qemutest.GetInfo(t, imagePath(p, v.ID)).Snapshots; len(got) != 1 {
		t.Fatalf("a refused clone left snapshots: %+v", got)
	}
}

// TestChainDepth makes clones of clones up to the limit; each reads through.
func TestChainDepth(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "0", Source{})
	write(t, p, v.ID, 0, 5, 4096)
	for i := 1; i < maxChainDepth; i++ {
		v = create(t, p, itoa(int64(i)), Source{Volume: v.ID})
	}
	last := create(t, p, "last", Source{Volume: v.ID})
	wantBytes(t, p, last.ID, 0, 5, 4096)
	wantQEMU(t, imagePath(p, last.ID), 0, 5, 4096)
	if _, err := p.Create(t.Context(), CreateRequest{Name: "more", Params: DefaultParams(), Source: Source{Volume: last.ID}}); !errors.Is(err, ErrTooDeep) {
		t.Fatalf("got %v, want ErrTooDeep", err)
	}
}

// TestFollowsAMovedPool: overlays name the old path, the IDs in it are enough.
func TestFollowsAMovedPool(t *testing.T) {
	parent := t.TempDir()
	from, to := filepath.Join(parent, "from"), filepath.Join(parent, "to")
	if err := os.Mkdir(from, 0o700); err != nil {
		t.Fatal(err)
	}
	p := openPool(t, from, Options{})
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 4096)
	c := create(t, p, "c", Source{Volume: v.ID})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, to, Options{})
	defer p.Close()
	wantBytes(t, p, c.ID, 0, 1, 4096)
}

// TestViewIsSmall: a clone costs metadata, whatever its source holds.
func TestViewIsSmall(t *testing.T) {
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 0, 1, 8<<20)
	c := create(t, p, "c", Source{Volume: v.ID})
	views, err := filepath.Glob(filepath.Join(p.Path(), "volumes/*/views/*.qcow2"))
	if err != nil || len(views) != 1 {
		t.Fatalf("views: %v, %v", views, err)
	}
	for _, path := range []string{views[0], imagePath(p, c.ID)} {
		if got := allocated(t, path); got > 1<<20 {
			t.Errorf("%s takes %d bytes", path, got)
		}
	}
}

// A volume with snapshots grows; the smaller state can be restored and deleted.
func TestExpandWithSnapshots(t *testing.T) {
	const n = 1 << 20
	p := newPool(t)
	v := create(t, p, "v", Source{})
	write(t, p, v.ID, 7*n, 1, n)
	small := snapshot(t, p, "small", v.ID)
	if _, err := p.Expand(t.Context(), v.ID, SizeRange{Required: 4096 * n}); err != nil {
		t.Fatal(err)
	}
	write(t, p, v.ID, 4095*n, 2, n)
	large := snapshot(t, p, "large", v.ID)
	if small.Size != 8*n || large.Size != 4096*n {
		t.Errorf("snapshots of %d and %d bytes", small.Size, large.Size)
	}
	for _, c := range []struct {
		from Snapshot
		size int64
		want int64
	}{{small, 0, 8 * n}, {small, 64 * n, 64 * n}, {large, 0, 4096 * n}} {
		r, err := p.Create(t.Context(), CreateRequest{Name: itoa(c.want), Size: SizeRange{Required: c.size}, Params: DefaultParams(), Source: Source{Snapshot: c.from.ID}})
		if err != nil || r.Size != c.want {
			t.Fatalf("restore %q: %d bytes, %v, want %d", c.from.Name, r.Size, err, c.want)
		}
		wantBytes(t, p, r.ID, 7*n, 1, n)
		if c.want > 8*n {
			wantBytes(t, p, r.ID, 8*n, 0, n)
		}
	}
	remove(t, p, small.ID)
	reap(t, p)
	wantBytes(t, p, v.ID, 7*n, 1, n)
	wantBytes(t, p, v.ID, 4095*n, 2, n)
}

// A snapshot that is cut while the volume gets its filesystem is refused: its
// record would not say what is in it. The retry is whole.
func TestSnapshotDuringFirstStage(t *testing.T) {
	p := newPool(t)
	for _, known := range []Filesystem{{FilesystemFormatted, "ext4"}, {State: FilesystemForeign}} {
		name := string(known.State)
		v := create(t, p, name, Source{})
		take := func(quiesce Quiesce) (Snapshot, error) {
			return p.CreateSnapshotQuiesced(t.Context(), "s "+name, v.ID, quiesce)
		}
		_, err := take(func(_ context.Context, cut func()) error {
			defer cut()
			return p.SetFilesystem(v.ID, known)
		})
		if !errors.Is(err, ErrBusy) {
			t.Errorf("%s: got %v, want ErrBusy", name, err)
		}
		s, err := take(nil)
		if err != nil {
			t.Fatal(err)
		}
		if c := create(t, p, "restored "+name, Source{Snapshot: s.ID}); c.Filesystem != known {
			t.Errorf("%s: a restore has %+v, want %+v", name, c.Filesystem, known)
		}
	}
}
