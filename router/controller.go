package router

import (
	"context"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/driver"
)

// controllerServer implements csi.ControllerServer.
type controllerServer struct {
	csi.UnimplementedControllerServer
	*Router
}

// forward makes a call of the agent that owns the volume or snapshot id.
func forward[Request, Response any](ctx context.Context, r *Router, id string,
	call func(csi.ControllerClient, context.Context, *Request, ...grpc.CallOption) (*Response, error), req *Request) (*Response, error) {
	g, ctx, err := r.owner(ctx, id)
	if err != nil {
		return nil, err
	}
	return call(csi.NewControllerClient(g.conn), ctx, req)
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (s controllerServer) ControllerGetCapabilities(ctx context.Context, _ *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return driver.Capabilities{}.Controller(ctx)
}

// DeleteVolume implements csi.ControllerServer. An ID that is not one of ours
// is deleted already.
func (s controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	resp, err := forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.DeleteVolume, req)
	if status.Code(err) == codes.NotFound {
		return &csi.DeleteVolumeResponse{}, nil
	}
	return resp, err
}

// DeleteSnapshot implements csi.ControllerServer. An ID that is not one of ours
// is deleted already.
func (s controllerServer) DeleteSnapshot(ctx context.Context, req *csi.DeleteSnapshotRequest) (*csi.DeleteSnapshotResponse, error) {
	resp, err := forward(ctx, s.Router, req.GetSnapshotId(), csi.ControllerClient.DeleteSnapshot, req)
	if status.Code(err) == codes.NotFound {
		return &csi.DeleteSnapshotResponse{}, nil
	}
	return resp, err
}

// ControllerGetVolume implements csi.ControllerServer.
func (s controllerServer) ControllerGetVolume(ctx context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	return forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.ControllerGetVolume, req)
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (s controllerServer) ValidateVolumeCapabilities(ctx context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	return forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.ValidateVolumeCapabilities, req)
}

// ControllerExpandVolume implements csi.ControllerServer.
func (s controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	return forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.ControllerExpandVolume, req)
}

// ControllerModifyVolume implements csi.ControllerServer.
func (s controllerServer) ControllerModifyVolume(ctx context.Context, req *csi.ControllerModifyVolumeRequest) (*csi.ControllerModifyVolumeResponse, error) {
	return forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.ControllerModifyVolume, req)
}

// ControllerGetVolumeHealth implements csi.ControllerServer.
func (s controllerServer) ControllerGetVolumeHealth(ctx context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	return forward(ctx, s.Router, req.GetVolumeId(), csi.ControllerClient.ControllerGetVolumeHealth, req)
}

// CreateSnapshot implements csi.ControllerServer.
func (s controllerServer) CreateSnapshot(ctx context.Context, req *csi.CreateSnapshotRequest) (*csi.CreateSnapshotResponse, error) {
	return forward(ctx, s.Router, req.GetSourceVolumeId(), csi.ControllerClient.CreateSnapshot, req)
}

// GetSnapshot implements csi.ControllerServer.
func (s controllerServer) GetSnapshot(ctx context.Context, req *csi.GetSnapshotRequest) (*csi.GetSnapshotResponse, error) {
	return forward(ctx, s.Router, req.GetSnapshotId(), csi.ControllerClient.GetSnapshot, req)
}
