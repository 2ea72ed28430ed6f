package volume

import (
	"encoding/json"
	"errors"
	"testing"

	"csi-qcow2/internal/storagetest"
)

// A report says who reads from whom and who holds whose space, to the byte.
func TestReport(t *testing.T) {
	const n, cluster = 1 << 20, 64 << 10
	p := newPool(t)
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 4*n)
	s := snapshot(t, p, "s", a.ID)
	write(t, p, a.ID, 0, 2, n)
	s2 := snapshot(t, p, "s2", a.ID)
	c := create(t, p, "c", Source{Snapshot: s.ID})
	d := create(t, p, "d", Source{Volume: a.ID})
	remove(t, p, s.ID)
	reap(t, p)

	r, err := p.Report(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	byID := make(map[string]VolumeReport)
	for _, v := range r.Volumes {
		byID[v.ID] = v
		if v.Problem != "" || v.Attached || v.Usage == nil || v.HostBytes == 0 {
			t.Errorf("volume %s: got %+v", v.Name, v)
		}
		if u := v.Usage; u != nil {
			sum := u.Metadata + u.Shared + u.Active.Unique
			for _, s := range v.Snapshots {
				sum += s.Usage.Unique
			}
			if sum != u.Total {
				t.Errorf("volume %s: parts are %d bytes, total %d", v.Name, sum, u.Total)
			}
		}
	}
	v := byID[a.ID]
	if len(r.Volumes) != 3 || len(v.Snapshots) != 3 {
		t.Fatalf("got %+v", r)
	}
	first, second, hidden := v.Snapshots[0], v.Snapshots[1], v.Snapshots[2]
	if first.ID != s.ID || !first.Deleted || len(first.Clones) != 1 || first.Clones[0] != c.ID || byID[c.ID].Reads != s.ID {
		t.Errorf("first snapshot: got %+v", first)
	}
	if second.ID != s2.ID || second.Name != "s2" || second.Deleted || second.Hidden || len(second.Clones) != 0 {
		t.Errorf("second snapshot: got %+v", second)
	}
	if !hidden.Hidden || len(hidden.Clones) != 1 || hidden.Clones[0] != d.ID || byID[d.ID].Reads != hidden.ID {
		t.Errorf("hidden snapshot: got %+v", hidden)
	}
	// Alone the first holds the MiB that was overwritten, its L1 table and its L2
	// table; the others share everything but an L1 table.
	if got, want := *first.Usage, (StateUsage{n + 2*cluster, 3 * n}); got != want {
		t.Errorf("first snapshot: got %+v, want %+v", got, want)
	}
	if got, want := *second.Usage, (StateUsage{cluster, 4*n + cluster}); got != want {
		t.Errorf("second snapshot: got %+v, want %+v", got, want)
	}
	if quick, err := p.Report(t.Context(), false); err != nil || quick.Volumes[0].Usage != nil || len(quick.Volumes) != 3 {
		t.Errorf("without usage: got %+v, %v", quick, err)
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}

// While the node agent is not there, images that it did not close are left alone.
func TestClosedOnly(t *testing.T) {
	dir := storagetest.MemoryDir(t)
	p := openPool(t, dir, Options{})
	a := create(t, p, "a", Source{})
	create(t, p, "b", Source{})
	s := snapshot(t, p, "s", a.ID)
	if err := p.updateRecord(p.find(a.ID), func(r *volumeRecord) { r.Open = true }); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	p = openPool(t, dir, Options{ClosedOnly: true})
	defer p.Close()
	if _, err := p.Revert(t.Context(), a.ID, s.ID); !errors.Is(err, ErrInUse) {
		t.Errorf("revert: got %v, want ErrInUse", err)
	}
	r, err := p.Report(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range r.Volumes {
		if (v.Problem != "") != (v.ID == a.ID) {
			t.Errorf("volume %s: problem %q", v.Name, v.Problem)
		}
	}
}
