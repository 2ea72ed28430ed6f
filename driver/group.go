package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"csi-qcow2/volume"
)

// groupServer implements csi.GroupControllerServer.
type groupServer struct {
	csi.UnimplementedGroupControllerServer
	*Driver
}

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (s groupServer) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{
			Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT,
		}},
	}}}, nil
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer: one cut over all
// volumes, with their filesystems frozen as CreateSnapshot does.
func (s groupServer) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	if err := required("name", req.GetName()); err != nil {
		return nil, err
	}
	freeze, err := parseFreeze(req.GetParameters())
	if err != nil {
		return nil, err
	}
	pool, err := s.poolOfAll(req.GetSourceVolumeIds())
	if err != nil {
		return nil, err
	}
	if err := s.checkUnique(pool, req.GetName(), (*volume.Pool).GroupNamed); err != nil {
		return nil, err
	}
	var quiesce volume.Quiesce
	if freeze {
		quiesce = s.quiesce(ctx, req.GetSourceVolumeIds()...)
	}
	if _, exists := pool.GroupNamed(req.GetName()); !exists { // a repetition need not sync again
		for _, id := range req.GetSourceVolumeIds() {
			s.syncStaged(ctx, id)
		}
	}
	g, err := pool.CreateGroup(ctx, req.GetName(), req.GetSourceVolumeIds(), quiesce)
	if err != nil {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("group snapshot exists", "groupSnapshotID", g.ID, "name", g.Name, "snapshots", len(g.Snapshots))
	return &csi.CreateVolumeGroupSnapshotResponse{GroupSnapshot: csiGroup(g)}, nil
}

// poolOfAll returns the pool of the volumes ids. A moment is one of one pool.
func (d *Driver) poolOfAll(ids []string) (*volume.Pool, error) {
	if len(ids) == 0 {
		return nil, fmt.Errorf("%w: source_volume_ids are missing", errInvalid)
	}
	var pool *volume.Pool
	for _, id := range ids {
		if err := required("source_volume_ids", id); err != nil {
			return nil, err
		}
		p, err := d.pools.of(id)
		if err != nil {
			return nil, err
		}
		if pool != nil && p != pool {
			return nil, fmt.Errorf("%w: volume %s is in pool %q, volume %s in %q; a group snapshot is of one pool", errPrecondition, ids[0], pool.Path(), id, p.Path())
		}
		pool = p
	}
	return pool, nil
}

func csiGroup(g volume.Group) *csi.VolumeGroupSnapshot {
	out := &csi.VolumeGroupSnapshot{GroupSnapshotId: g.ID, CreationTime: timestamppb.New(g.Created), ReadyToUse: true}
	for _, snap := range g.Snapshots {
		out.Snapshots = append(out.Snapshots, csiSnapshot(snap))
	}
	return out
}

// group returns the group snapshot id, whose members must be snapshots. A CO
// that names none has lost them.
func (d *Driver) group(id string, snapshots []string) (*volume.Pool, volume.Group, error) {
	if err := required("group_snapshot_id", id); err != nil {
		return nil, volume.Group{}, err
	}
	pool, err := d.pools.of(id)
	if err != nil {
		return nil, volume.Group{}, err
	}
	g, err := pool.GetGroup(id)
	if err != nil {
		return nil, volume.Group{}, err
	}
	var members []string
	for _, snap := range g.Snapshots {
		members = append(members, snap.ID)
	}
	slices.Sort(members)
	if given := slices.Sorted(slices.Values(snapshots)); len(given) > 0 && !slices.Equal(given, members) {
		return nil, volume.Group{}, fmt.Errorf("%w: snapshot_ids %q: the members of %s are %q", errInvalid, given, id, members)
	}
	return pool, g, nil
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer. A group that is not
// in its pool is deleted already, and so is what has no ID of ours.
func (s groupServer) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	pool, g, err := s.group(req.GetGroupSnapshotId(), req.GetSnapshotIds())
	if errors.Is(err, volume.ErrNotFound) {
		_, err = s.pools.here(req.GetGroupSnapshotId())
	} else if err == nil {
		err = pool.DeleteGroup(ctx, g.ID)
	}
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("group snapshot is deleted", "groupSnapshotID", req.GetGroupSnapshotId())
	return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s groupServer) GetVolumeGroupSnapshot(_ context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	_, g, err := s.group(req.GetGroupSnapshotId(), req.GetSnapshotIds())
	if err != nil {
		return nil, err
	}
	return &csi.GetVolumeGroupSnapshotResponse{GroupSnapshot: csiGroup(g)}, nil
}
