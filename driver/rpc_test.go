package driver

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// badIDs are what no volume or snapshot can be called.
var badIDs = []string{"../x", "/etc", "a/b", "%2e%2e", ".", "..", "vol-1", "ｖol-00000000-00000000000000000000000000000000",
	absentVolume, absentSnapshot}

// What a pool may have that this node has not.
const (
	absentVolume   = "vol-00000000-00000000000000000000000000000000"
	absentSnapshot = "snap-00000000-00000000000000000000000000000000"
	absentGroup    = "group-00000000-00000000000000000000000000000000"
)

// deleted returns the code of a call that deletes id, which is not here.
func deleted(id string) codes.Code {
	if id == absentVolume || id == absentSnapshot || id == absentGroup {
		return codes.Unavailable
	}
	return codes.OK
}

// long is beyond the limit of a string.
var long = strings.Repeat("x", maxStringBytes+1)

func caps(c ...*csi.VolumeCapability) []*csi.VolumeCapability { return c }

func TestCreateVolumeArguments(t *testing.T) {
	r := newRig(t)
	first := r.volume("exists", nil)
	snap, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: first})
	if err != nil {
		t.Fatal(err)
	}
	fromSnap := func(id string) *csi.VolumeContentSource {
		return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
	}
	big := make(map[string]string)
	for i := range 1000 {
		big[fmt.Sprint("csi.storage.k8s.io/", i)] = "x"
	}
	topology := func(node string) *csi.TopologyRequirement {
		return &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"topology.csi-qcow2.dev/node": node}}}}
	}
	for _, c := range []struct {
		name string
		edit func(*csi.CreateVolumeRequest)
		want codes.Code
	}{
		{"nothing wrong", func(*csi.CreateVolumeRequest) {}, codes.OK},
		{"again", func(*csi.CreateVolumeRequest) {}, codes.OK},
		{"no name", func(q *csi.CreateVolumeRequest) { q.Name = "" }, codes.InvalidArgument},
		{"long name", func(q *csi.CreateVolumeRequest) { q.Name = long }, codes.InvalidArgument},
		{"control character", func(q *csi.CreateVolumeRequest) { q.Name = "a\nb" }, codes.InvalidArgument},
		{"NUL", func(q *csi.CreateVolumeRequest) { q.Name = "a\x00" }, codes.InvalidArgument},
		{"path as a name", func(q *csi.CreateVolumeRequest) { q.Name = "../../etc" }, codes.OK},
		{"no capabilities", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = nil }, codes.InvalidArgument},
		{"no access type", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[0].AccessType = nil }, codes.InvalidArgument},
		{"no access mode", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[0].AccessMode = nil }, codes.InvalidArgument},
		{"many nodes write", func(q *csi.CreateVolumeRequest) {
			withMode(q.VolumeCapabilities[0], csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)
		}, codes.InvalidArgument},
		{"many nodes, one writes", func(q *csi.CreateVolumeRequest) {
			withMode(q.VolumeCapabilities[0], csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER)
		}, codes.InvalidArgument},
		{"btrfs", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = caps(mountCap("btrfs")) }, codes.InvalidArgument},
		{"options in fsType", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities = caps(mountCap("ext4 -E x")) }, codes.InvalidArgument},
		{"mount group", func(q *csi.CreateVolumeRequest) { q.VolumeCapabilities[0].GetMount().VolumeMountGroup = "1" }, codes.InvalidArgument},
		{"negative size", func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = -1 }, codes.InvalidArgument},
		{"negative limit", func(q *csi.CreateVolumeRequest) { q.CapacityRange.LimitBytes = -1 }, codes.InvalidArgument},
		{"limit below size", func(q *csi.CreateVolumeRequest) { q.CapacityRange.LimitBytes = 1 }, codes.InvalidArgument},
		{"beyond the limit of the format", func(q *csi.CreateVolumeRequest) { q.CapacityRange.RequiredBytes = math.MaxInt64 }, codes.OutOfRange},
		{"limit below the minimum", func(q *csi.CreateVolumeRequest) { q.CapacityRange = &csi.CapacityRange{LimitBytes: 4096} }, codes.OutOfRange},
		{"no size", func(q *csi.CreateVolumeRequest) { q.Name, q.CapacityRange = "no size", nil }, codes.OK},
		{"exists, larger", func(q *csi.CreateVolumeRequest) { q.Name, q.CapacityRange.RequiredBytes = "exists", 1<<30 }, codes.AlreadyExists},
		{"exists, other parameters", func(q *csi.CreateVolumeRequest) {
			q.Name, q.Parameters = "exists", map[string]string{"clusterSize": "4096"}
		}, codes.AlreadyExists},
		{"exists, other source", func(q *csi.CreateVolumeRequest) { q.Name, q.VolumeContentSource = "exists", fromVolume(first) }, codes.AlreadyExists},
		{"unknown parameter", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"x": "y"} }, codes.InvalidArgument},
		{"parameter in another case", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"ClusterSize": "65536"} }, codes.InvalidArgument},
		{"empty parameter", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"": "x"} }, codes.InvalidArgument},
		{"cluster size", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"clusterSize": "3000"} }, codes.InvalidArgument},
		{"Kubernetes' parameters", func(q *csi.CreateVolumeRequest) {
			q.Name, q.Parameters = "k8s", map[string]string{"csi.storage.k8s.io/pvc/name": "x"}
		}, codes.OK},
		{"map beyond 4 KiB", func(q *csi.CreateVolumeRequest) { q.Parameters = big }, codes.InvalidArgument},
		{"pool", func(q *csi.CreateVolumeRequest) { q.Name, q.Parameters = "pool", map[string]string{"pool": "default"} }, codes.OK},
		{"unknown pool", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"pool": "../x"} }, codes.InvalidArgument},
		{"pool in another case", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"pool": "Default"} }, codes.InvalidArgument},
		{"empty pool", func(q *csi.CreateVolumeRequest) { q.Parameters = map[string]string{"pool": ""} }, codes.InvalidArgument},
		{"mutable parameters", func(q *csi.CreateVolumeRequest) { q.MutableParameters = map[string]string{"iops": "1"} }, codes.InvalidArgument},
		{"full preallocation beyond the pool", func(q *csi.CreateVolumeRequest) {
			q.Name, q.Parameters = "full", map[string]string{"preallocation": "full"}
			q.CapacityRange.RequiredBytes = 60 << 40
		}, codes.ResourceExhausted},
		{"empty source", func(q *csi.CreateVolumeRequest) { q.VolumeContentSource = &csi.VolumeContentSource{} }, codes.InvalidArgument},
		{"smaller than its source", func(q *csi.CreateVolumeRequest) {
			q.Name, q.VolumeContentSource, q.CapacityRange.RequiredBytes = "small", fromSnap(snap.GetSnapshot().GetSnapshotId()), 2<<20
		}, codes.OutOfRange},
		{"from a snapshot", func(q *csi.CreateVolumeRequest) {
			q.Name, q.VolumeContentSource = "restored", fromSnap(snap.GetSnapshot().GetSnapshotId())
		}, codes.OK},
		{"this node", func(q *csi.CreateVolumeRequest) { q.Name, q.AccessibilityRequirements = "here", topology("node-1") }, codes.OK},
		{"pool of another node", func(q *csi.CreateVolumeRequest) {
			q.Parameters, q.AccessibilityRequirements = map[string]string{"pool": "elsewhere"}, topology("node-1")
		}, codes.ResourceExhausted},
		{"another node", func(q *csi.CreateVolumeRequest) { q.Name, q.AccessibilityRequirements = "there", topology("node-2") }, codes.ResourceExhausted},
	} {
		req := &csi.CreateVolumeRequest{Name: "v", VolumeCapabilities: caps(mountCap("ext4")), CapacityRange: &csi.CapacityRange{RequiredBytes: 4 << 20}}
		c.edit(req)
		_, err := r.CreateVolume(t.Context(), req)
		wantCode(t, c.name, err, c.want)
	}
	for _, id := range badIDs {
		for _, source := range []*csi.VolumeContentSource{fromVolume(id), fromSnap(id)} {
			_, err := r.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "bad source", VolumeCapabilities: caps(mountCap("")), VolumeContentSource: source})
			wantCode(t, "source "+id, err, codes.NotFound)
		}
	}
}

// TestBadIDs: what is not ours is not found, deletes well, and touches nothing. Of what
// is in a pool that is not here nobody knows whether it is deleted.
func TestBadIDs(t *testing.T) {
	r := newRig(t)
	for _, id := range badIDs {
		for what, c := range map[string]struct {
			call func() error
			want codes.Code
		}{
			"DeleteVolume": {func() error {
				_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
				return err
			}, deleted(id)},
			"DeleteSnapshot": {func() error {
				_, err := r.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: id})
				return err
			}, deleted(id)},
			"CreateSnapshot": {func() error {
				_, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
				return err
			}, codes.NotFound},
			"GetSnapshot": {func() error {
				_, err := r.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{SnapshotId: id})
				return err
			}, codes.NotFound},
			"ListSnapshots": {func() error {
				l, err := r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SnapshotId: id})
				return errors.Join(err, empty(len(l.GetEntries())))
			}, codes.OK},
			"ListSnapshots of a volume": {func() error {
				l, err := r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{SourceVolumeId: id})
				return errors.Join(err, empty(len(l.GetEntries())))
			}, codes.OK},
			"ControllerGetVolume": {func() error {
				_, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
				return err
			}, codes.NotFound},
			"ControllerGetVolumeHealth": {func() error {
				_, err := r.ControllerGetVolumeHealth(t.Context(), &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
				return err
			}, codes.NotFound},
			"ValidateVolumeCapabilities": {func() error {
				_, err := r.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: caps(mountCap(""))})
				return err
			}, codes.NotFound},
			"ControllerExpandVolume": {func() error {
				_, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1}})
				return err
			}, codes.NotFound},
			"NodeStageVolume":     {func() error { return r.stage(id, mountCap("")) }, codes.NotFound},
			"NodePublishVolume":   {func() error { return r.publish(id, mountCap("")) }, codes.NotFound},
			"NodeUnpublishVolume": {func() error { return r.unpublish(id) }, codes.OK},
			"NodeUnstageVolume":   {func() error { return r.unstage(id) }, codes.OK},
			"NodeGetVolumeStats": {func() error {
				_, err := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: "/x"})
				return err
			}, codes.NotFound},
			"NodeExpandVolume": {func() error {
				_, err := r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: "/x"})
				return err
			}, codes.NotFound},
			"NodeGetVolumeHealth": {func() error {
				_, err := r.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
				return err
			}, codes.NotFound},
		} {
			wantCode(t, what+" "+id, c.call(), c.want)
		}
	}
}

func empty(n int) error {
	if n > 0 {
		return fmt.Errorf("%d entries", n)
	}
	return nil
}

func TestMissingArguments(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	for what, call := range map[string]func() error{
		"DeleteVolume":   func() error { _, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{}); return err },
		"DeleteSnapshot": func() error { _, err := r.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{}); return err },
		"GetSnapshot":    func() error { _, err := r.GetSnapshot(t.Context(), &csi.GetSnapshotRequest{}); return err },
		"CreateSnapshot without a name": func() error {
			_, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{SourceVolumeId: id})
			return err
		},
		"CreateSnapshot without a source": func() error {
			_, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s"})
			return err
		},
		"CreateSnapshot with a parameter": func() error {
			_, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id, Parameters: map[string]string{"x": "y"}})
			return err
		},
		"ControllerGetVolume": func() error {
			_, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{})
			return err
		},
		"ValidateVolumeCapabilities": func() error {
			_, err := r.ValidateVolumeCapabilities(t.Context(), &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id})
			return err
		},
		"ListVolumes": func() error {
			_, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1})
			return err
		},
		"ListSnapshots": func() error {
			_, err := r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{MaxEntries: -1})
			return err
		},
		"ControllerListVolumeHealth": func() error {
			_, err := r.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{MaxEntries: -1})
			return err
		},
		"ControllerExpandVolume without a range": func() error {
			_, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id})
			return err
		},
		"NodeStageVolume, no volume": func() error { return r.stage("", mountCap("")) },
		"NodeStageVolume, no cap":    func() error { return r.stage(id, nil) },
		"NodeStageVolume, flag":      func() error { return r.stage(id, mountCap("", "suid")) },
		"NodeStageVolume, comma":     func() error { return r.stage(id, mountCap("", "ro,suid")) },
		"NodeStageVolume, loop":      func() error { return r.stage(id, mountCap("", "loop")) },
		"NodeStageVolume, fsType":    func() error { return r.stage(id, mountCap("vfat")) },
		"NodePublishVolume, no cap":  func() error { return r.publish(id, nil) },
		"NodeGetVolumeStats": func() error {
			_, err := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id})
			return err
		},
		"NodeExpandVolume": func() error {
			_, err := r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id})
			return err
		},
		"NodeGetVolumeHealth": func() error {
			_, err := r.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{})
			return err
		},
	} {
		wantCode(t, what, call(), codes.InvalidArgument)
	}
	link := r.path("link")
	if err := os.Symlink("/etc", link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"", "relative", "/a/../b", "/a//b", "/", link, link + "/", "/" + strings.Repeat("x", 4096), "/a\x01"} {
		for what, call := range map[string]func() error{
			"stage": func() error {
				_, err := r.NodeStageVolume(t.Context(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: path, VolumeCapability: mountCap("")})
				return err
			},
			"unstage": func() error {
				_, err := r.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: path})
				return err
			},
			"publish": func() error {
				_, err := r.NodePublishVolume(t.Context(), &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: "/x", TargetPath: path, VolumeCapability: mountCap("")})
				return err
			},
			"unpublish": func() error {
				_, err := r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: path})
				return err
			},
		} {
			wantCode(t, fmt.Sprintf("%s at %.20q", what, path), call(), codes.InvalidArgument)
		}
	}
}

func TestStageStates(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	wantCode(t, "publish before stage", r.publish(id, mountCap("")), codes.FailedPrecondition)
	wantCode(t, "unstage before stage", r.unstage(id), codes.OK)
	wantCode(t, "unpublish before publish", r.unpublish(id), codes.OK)
	wantCode(t, "stage", r.stage(id, mountCap("ext4")), codes.OK)
	wantCode(t, "stage as another filesystem", r.stage(id, mountCap("xfs")), codes.AlreadyExists)
	wantCode(t, "stage as block", r.stage(id, blockCap()), codes.AlreadyExists)
	other := r.stageRequest(id, mountCap("ext4"))
	other.StagingTargetPath = r.path("elsewhere")
	_, err := r.NodeStageVolume(t.Context(), other)
	wantCode(t, "stage elsewhere", err, codes.AlreadyExists)
	wantCode(t, "publish as block", r.publish(id, blockCap()), codes.FailedPrecondition)
	elsewhere := r.publishRequest(id, mountCap(""))
	elsewhere.StagingTargetPath = r.path("elsewhere")
	_, err = r.NodePublishVolume(t.Context(), elsewhere)
	wantCode(t, "publish from elsewhere", err, codes.FailedPrecondition)
	_, err = r.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: r.path("elsewhere")})
	wantCode(t, "unstage elsewhere", err, codes.FailedPrecondition)
	for _, path := range []string{"some/path", "/x", r.path("target")} {
		_, err = r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: path})
		wantCode(t, "stats at "+path, err, codes.NotFound)
		_, err = r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: path})
		wantCode(t, "expand at "+path, err, codes.NotFound)
	}
	_, err = r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: r.path("staging"), CapacityRange: &csi.CapacityRange{RequiredBytes: 1 << 40}})
	wantCode(t, "expand beyond the image", err, codes.OutOfRange)
	if err := os.WriteFile(r.path("target"), []byte("not ours"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "unpublish where a file is", r.unpublish(id), codes.FailedPrecondition)
	if _, err := os.Stat(r.path("target")); err != nil {
		t.Errorf("the file is gone: %v", err)
	}
	wantCode(t, "unstage", r.unstage(id), codes.OK)
	wantCode(t, "delete", func() error {
		_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		return err
	}(), codes.OK)
	wantCode(t, "stage after delete", r.stage(id, mountCap("")), codes.NotFound)
	wantCode(t, "unstage after delete", r.unstage(id), codes.OK)
	r.wantClean()
}

func TestExpandOnline(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{8 << 20, 8 << 20, 1} {
		resp, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
		if err != nil || resp.GetCapacityBytes() != 8<<20 || !resp.GetNodeExpansionRequired() {
			t.Fatalf("expand to %d: %v, %v", size, resp, err)
		}
		node, err := r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: r.path("staging"), CapacityRange: &csi.CapacityRange{RequiredBytes: size}})
		if err != nil || node.GetCapacityBytes() != 8<<20 {
			t.Fatalf("node expand to %d: %v, %v", size, node, err)
		}
	}
	if got := r.driver.stagedVolume(id).device.Size(); got != 8<<20 {
		t.Errorf("the device has %d bytes", got)
	}
	_, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 1, LimitBytes: 2 << 20}})
	wantCode(t, "limit below the size", err, codes.OutOfRange)
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
}

func TestValidateVolumeCapabilities(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	for _, c := range []struct {
		req       *csi.ValidateVolumeCapabilitiesRequest
		confirmed bool
	}{
		{&csi.ValidateVolumeCapabilitiesRequest{VolumeCapabilities: caps(mountCap("xfs"), blockCap())}, true},
		{&csi.ValidateVolumeCapabilitiesRequest{VolumeCapabilities: caps(mountCap("btrfs"))}, false},
		{&csi.ValidateVolumeCapabilitiesRequest{VolumeCapabilities: caps(withMode(blockCap(), csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER))}, false},
		{&csi.ValidateVolumeCapabilitiesRequest{VolumeCapabilities: caps(blockCap()), Parameters: map[string]string{"x": "y"}}, false},
		{&csi.ValidateVolumeCapabilitiesRequest{VolumeCapabilities: caps(blockCap()), MutableParameters: map[string]string{"x": "y"}}, false},
	} {
		c.req.VolumeId = id
		resp, err := r.ValidateVolumeCapabilities(t.Context(), c.req)
		if err != nil || (resp.GetConfirmed() != nil) != c.confirmed || (resp.GetMessage() == "") != c.confirmed {
			t.Errorf("%v: got %v, %v", c.req, resp, err)
		}
	}
}

func TestGetCapacity(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		req  *csi.GetCapacityRequest
		none bool
		code codes.Code
	}{
		{&csi.GetCapacityRequest{}, false, codes.OK},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"pool": "default"}}, false, codes.OK},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"pool": "elsewhere"}}, true, codes.OK},
		{&csi.GetCapacityRequest{Parameters: map[string]string{"x": "y"}}, true, codes.InvalidArgument},
		{&csi.GetCapacityRequest{VolumeCapabilities: caps(mountCap("vfat"))}, true, codes.OK},
		{&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{"topology.csi-qcow2.dev/node": "node-1"}}}, false, codes.OK},
		{&csi.GetCapacityRequest{AccessibleTopology: &csi.Topology{Segments: map[string]string{"topology.csi-qcow2.dev/node": "node-2"}}}, true, codes.OK},
	} {
		resp, err := r.GetCapacity(t.Context(), c.req)
		wantCode(t, c.req.String(), err, c.code)
		if (resp.GetAvailableCapacity() == 0) != c.none {
			t.Errorf("%v: got %v", c.req, resp)
		}
	}
}

// TestUndeclaredRPCs are answered as such.
func TestUndeclaredRPCs(t *testing.T) {
	r := newRig(t)
	for what, call := range map[string]func() error{
		"ControllerPublishVolume": func() error {
			_, err := r.ControllerPublishVolume(t.Context(), &csi.ControllerPublishVolumeRequest{})
			return err
		},
		"ControllerUnpublishVolume": func() error {
			_, err := r.ControllerUnpublishVolume(t.Context(), &csi.ControllerUnpublishVolumeRequest{})
			return err
		},
		"ControllerModifyVolume": func() error {
			_, err := r.ControllerModifyVolume(t.Context(), &csi.ControllerModifyVolumeRequest{})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestXFSFits: a volume that is to have an xfs filesystem is large enough for one;
// otherwise it could never be staged.
func TestXFSFits(t *testing.T) {
	r := newRig(t)
	create := func(name string, required, limit int64, c *csi.VolumeCapability) (int64, error) {
		resp, err := r.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: caps(c),
			CapacityRange: &csi.CapacityRange{RequiredBytes: required, LimitBytes: limit}})
		return resp.GetVolume().GetCapacityBytes(), err
	}
	for range 2 {
		if size, err := create("small", 1<<20, 0, mountCap("xfs")); err != nil || size != minXFSBytes {
			t.Errorf("1 MiB of xfs: got %d, %v", size, err)
		}
		if size, err := create("other", 1<<20, 0, mountCap("ext4")); err != nil || size != 1<<20 {
			t.Errorf("1 MiB of ext4: got %d, %v", size, err)
		}
	}
	for _, required := range []int64{0, 1 << 20} {
		_, err := create("limited", required, 200<<20, mountCap("xfs"))
		wantCode(t, "at most 200 MiB of xfs", err, codes.OutOfRange)
	}
	_, err := create("senseless", 2<<20, 1<<20, mountCap("xfs"))
	wantCode(t, "more required than the limit", err, codes.InvalidArgument)
	room, err := r.GetCapacity(t.Context(), &csi.GetCapacityRequest{VolumeCapabilities: caps(mountCap("xfs"))})
	if err != nil || room.GetMinimumVolumeSize().GetValue() != minXFSBytes {
		t.Errorf("capacity: %v, %v", room, err)
	}
}
