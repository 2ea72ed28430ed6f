package router

import (
	"context"
	"math"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/volume"
)

// A lister is one kind of list, of one agent: the items after token, at most
// limit (0 for all), and the token of the next page.
type lister[T any] func(ctx context.Context, c csi.ControllerClient, token string, limit int32) ([]T, string, error)

// list collects a page over all agents in the order of their nodes. A token is
// the last ID of a page, as the agents have it; its pool tells the node.
func list[T any](ctx context.Context, r *Router, token string, limit int32, of lister[T], id func(T) string) ([]T, string, error) {
	if limit < 0 {
		return nil, "", status.Errorf(codes.InvalidArgument, "max_entries %d is negative", limit)
	}
	all, err := r.agents.all()
	if err != nil {
		return nil, "", err
	}
	if token != "" {
		pool, err := volume.PoolOf(token)
		if err != nil {
			return nil, "", status.Errorf(codes.Aborted, "starting_token %q is not one of ours", token)
		}
		from, err := r.withPool(ctx, pool)
		if err != nil {
			return nil, "", err
		}
		for len(all) > 0 && all[0].node < from.node {
			all = all[1:]
		}
	}
	var items []T
	for i, g := range all {
		room := int32(0)
		if limit > 0 {
			if room = limit - int32(len(items)); room == 0 {
				return items, id(items[len(items)-1]), nil
			}
		}
		if i > 0 {
			token = ""
		}
		some, next, err := of(ctx, csi.NewControllerClient(g.conn), token, room)
		if err != nil {
			return nil, "", err
		}
		if items = append(items, some...); next != "" {
			return items, next, nil
		}
	}
	return items, "", nil
}

// ListVolumes implements csi.ControllerServer.
func (s controllerServer) ListVolumes(ctx context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	entries, next, err := list(ctx, s.Router, req.GetStartingToken(), req.GetMaxEntries(),
		func(ctx context.Context, c csi.ControllerClient, token string, limit int32) ([]*csi.ListVolumesResponse_Entry, string, error) {
			resp, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: token, MaxEntries: limit})
			return resp.GetEntries(), resp.GetNextToken(), err
		},
		func(e *csi.ListVolumesResponse_Entry) string { return e.GetVolume().GetVolumeId() })
	if err != nil {
		return nil, err
	}
	return &csi.ListVolumesResponse{Entries: entries, NextToken: next}, nil
}

// ListSnapshots implements csi.ControllerServer. A filter names its node.
func (s controllerServer) ListSnapshots(ctx context.Context, req *csi.ListSnapshotsRequest) (*csi.ListSnapshotsResponse, error) {
	for _, id := range []string{req.GetSnapshotId(), req.GetSourceVolumeId()} {
		if id == "" {
			continue
		}
		resp, err := forward(ctx, s.Router, id, csi.ControllerClient.ListSnapshots, req)
		if status.Code(err) == codes.NotFound {
			return &csi.ListSnapshotsResponse{}, nil
		}
		return resp, err
	}
	entries, next, err := list(ctx, s.Router, req.GetStartingToken(), req.GetMaxEntries(),
		func(ctx context.Context, c csi.ControllerClient, token string, limit int32) ([]*csi.ListSnapshotsResponse_Entry, string, error) {
			resp, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{StartingToken: token, MaxEntries: limit})
			return resp.GetEntries(), resp.GetNextToken(), err
		},
		func(e *csi.ListSnapshotsResponse_Entry) string { return e.GetSnapshot().GetSnapshotId() })
	if err != nil {
		return nil, err
	}
	return &csi.ListSnapshotsResponse{Entries: entries, NextToken: next}, nil
}

// ControllerListVolumeHealth implements csi.ControllerServer.
func (s controllerServer) ControllerListVolumeHealth(ctx context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	entries, next, err := list(ctx, s.Router, req.GetStartingToken(), req.GetMaxEntries(),
		func(ctx context.Context, c csi.ControllerClient, token string, limit int32) ([]*csi.VolumeHealth, string, error) {
			resp, err := c.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{StartingToken: token, MaxEntries: limit})
			return resp.GetEntries(), resp.GetNextToken(), err
		},
		func(h *csi.VolumeHealth) string { return h.GetVolumeId() })
	if err != nil {
		return nil, err
	}
	return &csi.ControllerListVolumeHealthResponse{Entries: entries, NextToken: next}, nil
}

// GetCapacity implements csi.ControllerServer: of the node that is asked for,
// or of all together.
func (s controllerServer) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if t := req.GetAccessibleTopology(); len(t.GetSegments()) > 0 {
		node := t.GetSegments()[s.topologyKey()]
		if node == "" {
			return &csi.GetCapacityResponse{}, nil
		}
		g, err := s.onNode(node)
		if err != nil {
			return nil, err
		}
		return csi.NewControllerClient(g.conn).GetCapacity(ctx, req)
	}
	all, err := s.agents.all()
	if err != nil {
		return nil, err
	}
	sum := &csi.GetCapacityResponse{}
	for _, g := range all {
		resp, err := csi.NewControllerClient(g.conn).GetCapacity(ctx, req)
		if err != nil {
			return nil, err
		}
		room := min(resp.GetAvailableCapacity(), math.MaxInt64-sum.AvailableCapacity)
		sum.AvailableCapacity += room
		sum.MinimumVolumeSize = resp.GetMinimumVolumeSize()
	}
	return sum, nil
}
