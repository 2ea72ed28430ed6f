package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"csi-qcow2/volume"
)

// parseFreeze returns whether a VolumeSnapshotClass, or one of group snapshots,
// wants mounted filesystems frozen.
func parseFreeze(parameters map[string]string) (bool, error) {
	freeze := true
	for name, value := range parameters {
		switch {
		case strings.HasPrefix(name, foreignPrefix):
		case name == "deletionPolicy": // of group classes that Kubernetes' own tests make; the CO keeps to it
		case name != "freeze":
			return false, fmt.Errorf("%w: unknown snapshot parameter %q; known is freeze", errInvalid, name)
		case value != "true" && value != "false":
			return false, fmt.Errorf(`%w: parameter freeze=%q: want "true" or "false"`, errInvalid, value)
		default:
			freeze = value == "true"
		}
	}
	return freeze, nil
}

// CreateSnapshot implements csi.ControllerServer. Of a mounted filesystem, what
// was written before the call is in the snapshot: it is synced first. Then it is
// frozen for the moment of the cut, unless the parameter freeze says no.
func (s controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	if err := firstOf(required("name", req.GetName()), required("source_volume_id", req.GetSourceVolumeId())); err != nil {
		return nil, err
	}
	freeze, err := parseFreeze(req.GetParameters())
	if err != nil {
		return nil, err
	}
	if len(req.GetAccessibilityRequirements().GetRequisite()) > 0 {
		return nil, fmt.Errorf("%w: accessibility_requirements are not supported", errInvalid)
	}
	pool, err := s.pools.of(req.GetSourceVolumeId())
	if err != nil {
		return nil, err
	}
	if err := s.checkUnique(pool, req.GetName(), (*volume.Pool).SnapshotNamed); err != nil {
		return nil, err
	}
	s.syncStaged(ctx, req.GetSourceVolumeId())
	var quiesce volume.Quiesce
	if freeze {
		quiesce = s.quiesce(ctx, req.GetSourceVolumeId())
	}
	snap, err := pool.CreateSnapshotQuiesced(ctx, req.GetName(), req.GetSourceVolumeId(), quiesce)
	if err != nil {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("snapshot exists", "snapshotID", snap.ID, "volumeID", snap.Volume, "name", snap.Name)
	return &csi.CreateSnapshotResponse{Snapshot: csiSnapshot(snap)}, nil
}

// checkUnique refuses a name that exists in another pool: names are unique in
// a driver, and a pool knows only its own.
func (d *Driver) checkUnique(pool *volume.Pool, name string, in func(*volume.Pool, string) (string, bool)) error {
	for _, other := range d.pools.all() {
		if other == pool {
			continue
		}
		if id, exists := in(other, name); exists {
			return fmt.Errorf("%w: %q is %s in pool %q", errIncompatible, name, id, other.Path())
		}
	}
	return nil
}

// syncStaged writes back what the node's page cache holds of a mounted
// volume. A failure or a hang does not stop the snapshot: it is crash-consistent anyway.
func (d *Driver) syncStaged(ctx context.Context, id string) {
	v := d.stagedVolume(id)
	if v == nil || v.hint.Block || d.lossOf(v) != nil {
		return
	}
	if err := d.probes.run(ctx, "sync "+id, func() error { return d.opts.Host.Sync(v.hint.StagingPath) }); err != nil {
		klog.FromContext(ctx).Error(err, "sync before snapshot", "volumeID", id, "stagingPath", v.hint.StagingPath)
	}
}

func csiSnapshot(s volume.Snapshot) *csi.Snapshot {
	return &csi.Snapshot{
		SnapshotId: s.ID, SourceVolumeId: s.Volume, SizeBytes: s.Size,
		CreationTime: timestamppb.New(s.Created), ReadyToUse: true, GroupSnapshotId: s.Group,
	}
}

// DeleteSnapshot implements csi.ControllerServer. A snapshot that is not in its pool
// is deleted already, and so is what has no ID of ours.
func (s controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	if err := required("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	pool, err := s.pools.here(req.GetSnapshotId())
	if err == nil {
		err = pool.DeleteSnapshot(ctx, req.GetSnapshotId())
	}
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("snapshot is deleted", "snapshotID", req.GetSnapshotId())
	return &csi.DeleteSnapshotResponse{}, nil
}

// GetSnapshot implements csi.ControllerServer.
func (s controllerServer) GetSnapshot(_ context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	if err := required("snapshot_id", req.GetSnapshotId()); err != nil {
		return nil, err
	}
	pool, err := s.pools.of(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	snap, err := pool.GetSnapshot(req.GetSnapshotId())
	if err != nil {
		return nil, err
	}
	return &csi.GetSnapshotResponse{Snapshot: csiSnapshot(snap)}, nil
}

// ListSnapshots implements csi.ControllerServer.
func (s controllerServer) ListSnapshots(_ context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	if err := checkPage(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	filter := volume.SnapshotFilter{ID: req.GetSnapshotId(), Volume: req.GetSourceVolumeId()}
	all, next, err := page(s.pools, req.GetStartingToken(), int(req.GetMaxEntries()),
		func(pool *volume.Pool, token string, limit int) ([]volume.Snapshot, string, error) {
			return pool.ListSnapshots(filter, token, limit)
		},
		func(s volume.Snapshot) string { return s.ID })
	if err != nil {
		return nil, err
	}
	resp := &csi.ListSnapshotsResponse{NextToken: next}
	for _, snap := range all {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: csiSnapshot(snap)})
	}
	return resp, nil
}
