package driver

import (
	"errors"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func TestOperator(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	resp, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	snap := resp.GetSnapshot().GetSnapshotId()
	if err := r.stage(id, mountCap("")); err != nil { // formats it
		t.Fatal(err)
	}
	o, err := DialOperator(t.Context(), "unix://"+r.path("s"))
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	all, err := o.Report(t.Context(), true)
	if err != nil || len(all) != 1 || len(all[0].Volumes) != 1 {
		t.Fatalf("report: got %+v, %v", all, err)
	}
	if v := all[0].Volumes[0]; v.ID != id || !v.Attached || v.Usage == nil || len(v.Snapshots) != 1 || v.Snapshots[0].Usage == nil {
		t.Errorf("report: got %+v", v)
	}
	for _, c := range []struct{ volume, snapshot, says string }{
		{id, snap, "staged"}, {"x", snap, "not found"}, {id, "", "staged"},
	} {
		if err := o.Revert(t.Context(), c.volume, c.snapshot); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("revert %q to %q: got %v, want %q", c.volume, c.snapshot, err, c.says)
		}
	}
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
	if err := o.Revert(t.Context(), id, snap); err != nil {
		t.Fatal(err)
	}
	// It is as empty as it was: it is formatted again.
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	if got := r.kernel.formats[id]; got != 2 {
		t.Errorf("formatted %d times, want 2", got)
	}
	if err := o.call(t.Context(), "Revert", []int{1}, new(struct{})); err == nil {
		t.Error("a request of another form: got nil")
	}
	if _, err := DialOperator(t.Context(), "unix://"+r.path("none")); !errors.Is(err, ErrNoAgent) {
		t.Errorf("no agent: got %v", err)
	}
}
