package driver

import (
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

func TestGroupSnapshot(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	a, b := r.volume("a", nil), r.volume("b", nil)
	if err := r.stage(a, mountCap("")); err != nil {
		t.Fatal(err)
	}
	create := func(name string, ids ...string) (*csi.VolumeGroupSnapshot, error) {
		resp, err := r.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: name, SourceVolumeIds: ids})
		return resp.GetGroupSnapshot(), err
	}
	g, err := create("g", a, b)
	if err != nil {
		t.Fatal(err)
	}
	r.wantFreezes(1)
	var ids []string
	for _, s := range g.GetSnapshots() {
		ids = append(ids, s.GetSnapshotId())
		if s.GetGroupSnapshotId() != g.GetGroupSnapshotId() || !s.GetReadyToUse() || s.GetSizeBytes() != 4<<20 {
			t.Errorf("member: got %v", s)
		}
		got, err := r.ControllerClient.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: s.GetSnapshotId()})
		if err != nil || !proto.Equal(got.GetSnapshot(), s) {
			t.Errorf("get member: got %v, %v, want %v", got, err, s)
		}
		_, err = r.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: s.GetSnapshotId()})
		wantCode(t, "delete a member", err, codes.InvalidArgument)
	}
	if len(ids) != 2 || !g.GetReadyToUse() || !g.GetCreationTime().IsValid() {
		t.Errorf("group: got %v", g)
	}
	again, err := create("g", b, a)
	if err != nil || !proto.Equal(again, g) {
		t.Errorf("again: got %v, %v, want %v", again, err, g)
	}
	r.wantFreezes(0)
	for _, c := range []struct {
		name string
		ids  []string
		want codes.Code
	}{
		{"", []string{a}, codes.InvalidArgument}, {"h", nil, codes.InvalidArgument}, {"h", []string{""}, codes.InvalidArgument},
		{"h", []string{a, a}, codes.InvalidArgument}, {"h", []string{a, "x"}, codes.NotFound}, {"g", []string{a}, codes.AlreadyExists},
		{long, []string{a}, codes.InvalidArgument},
	} {
		_, err := create(c.name, c.ids...)
		wantCode(t, "create "+c.name, err, c.want)
	}
	_, err = r.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "h", SourceVolumeIds: []string{a}, Parameters: map[string]string{"x": "y"}})
	wantCode(t, "unknown parameter", err, codes.InvalidArgument)
	many := make([]string, 1000)
	for i := range many {
		many[i] = "vol-00000000-00000000000000000000000000000000"
	}
	_, err = create("many", many...)
	wantCode(t, "a thousand IDs", err, codes.NotFound)
	_, err = create("many", slices.Concat(many, many)...)
	wantCode(t, "two thousand IDs", err, codes.InvalidArgument)

	get := func(id string, ids ...string) error {
		resp, err := r.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids})
		if err == nil && !proto.Equal(resp.GetGroupSnapshot(), g) {
			t.Errorf("get: got %v, want %v", resp.GetGroupSnapshot(), g)
		}
		return err
	}
	wantCode(t, "get", get(g.GetGroupSnapshotId(), ids...), codes.OK)
	wantCode(t, "get without members", get(g.GetGroupSnapshotId()), codes.OK)
	wantCode(t, "get with other members", get(g.GetGroupSnapshotId(), ids[0]), codes.InvalidArgument)
	wantCode(t, "get nothing", get(""), codes.InvalidArgument)
	remove := func(id string, ids ...string) error {
		_, err := r.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: ids})
		return err
	}
	wantCode(t, "delete with other members", remove(g.GetGroupSnapshotId(), ids[0]), codes.InvalidArgument)
	wantCode(t, "delete", remove(g.GetGroupSnapshotId(), ids[1], ids[0]), codes.OK)
	wantCode(t, "delete again", remove(g.GetGroupSnapshotId(), ids...), codes.OK)
	wantCode(t, "get deleted", get(g.GetGroupSnapshotId(), ids...), codes.NotFound)
	for _, id := range append(badIDs, absentGroup) {
		wantCode(t, "get "+id, get(id), codes.NotFound)
		wantCode(t, "delete "+id, remove(id), deleted(id))
	}
	wantCode(t, "delete nothing", remove(""), codes.InvalidArgument)
}
