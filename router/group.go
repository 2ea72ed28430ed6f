package router

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"csi-qcow2/driver"
	"csi-qcow2/volume"
)

// groupServer implements csi.GroupControllerServer.
type groupServer struct {
	csi.UnimplementedGroupControllerServer
	*Router
}

// GroupControllerGetCapabilities implements csi.GroupControllerServer.
func (s groupServer) GroupControllerGetCapabilities(context.Context, *csi.GroupControllerGetCapabilitiesRequest) (*csi.GroupControllerGetCapabilitiesResponse, error) {
	return &csi.GroupControllerGetCapabilitiesResponse{Capabilities: []*csi.GroupControllerServiceCapability{{
		Type: &csi.GroupControllerServiceCapability_Rpc{Rpc: &csi.GroupControllerServiceCapability_RPC{
			Type: csi.GroupControllerServiceCapability_RPC_CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT}},
	}}}, nil
}

// CreateVolumeGroupSnapshot implements csi.GroupControllerServer. One process
// stops the writes to all members for one moment; with members on two nodes
// there is no such moment.
func (s groupServer) CreateVolumeGroupSnapshot(ctx context.Context, req *csi.CreateVolumeGroupSnapshotRequest) (*csi.CreateVolumeGroupSnapshotResponse, error) {
	if len(req.GetSourceVolumeIds()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "source_volume_ids are missing")
	}
	var all *agent
	pools := make(map[string]bool)
	for _, id := range req.GetSourceVolumeIds() {
		g, _, err := s.owner(ctx, id)
		if err != nil {
			return nil, err
		}
		if all != nil && all.node != g.node { // the agent of a node may just be replaced
			return nil, status.Errorf(codes.FailedPrecondition,
				"volume %s is on node %s and %s on node %s: a group has one moment, and so one node; take a snapshot of each",
				req.GetSourceVolumeIds()[0], all.node, id, g.node)
		}
		all = g
		pool, _ := volume.PoolOf(id) // owner has parsed it
		pools[pool] = true
	}
	for pool := range pools {
		ctx = metadata.AppendToOutgoingContext(ctx, driver.PoolHeader, pool)
	}
	return csi.NewGroupControllerClient(all.conn).CreateVolumeGroupSnapshot(ctx, req)
}

// DeleteVolumeGroupSnapshot implements csi.GroupControllerServer. An ID that is
// not one of ours is deleted already.
func (s groupServer) DeleteVolumeGroupSnapshot(ctx context.Context, req *csi.DeleteVolumeGroupSnapshotRequest) (*csi.DeleteVolumeGroupSnapshotResponse, error) {
	g, ctx, err := s.owner(ctx, req.GetGroupSnapshotId())
	if status.Code(err) == codes.NotFound {
		return &csi.DeleteVolumeGroupSnapshotResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return csi.NewGroupControllerClient(g.conn).DeleteVolumeGroupSnapshot(ctx, req)
}

// GetVolumeGroupSnapshot implements csi.GroupControllerServer.
func (s groupServer) GetVolumeGroupSnapshot(ctx context.Context, req *csi.GetVolumeGroupSnapshotRequest) (*csi.GetVolumeGroupSnapshotResponse, error) {
	g, ctx, err := s.owner(ctx, req.GetGroupSnapshotId())
	if err != nil {
		return nil, err
	}
	return csi.NewGroupControllerClient(g.conn).GetVolumeGroupSnapshot(ctx, req)
}
