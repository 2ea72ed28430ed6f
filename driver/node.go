package driver

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// nodeServer implements csi.NodeServer.
type nodeServer struct {
	csi.UnimplementedNodeServer
	*Driver
}

// NodeGetCapabilities implements csi.NodeServer.
func (s nodeServer) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	resp := &csi.NodeGetCapabilitiesResponse{}
	for _, t := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.NodeServiceCapability_RPC_GET_STORAGE_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// NodeGetInfo implements csi.NodeServer.
func (s nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: s.opts.NodeID, MaxVolumesPerNode: s.opts.MaxVolumes, AccessibleTopology: s.topology()}, nil
}

// at returns the staged volume id if path is its staging path or one of its targets.
func (d *Driver) at(id, path string) (*stagedVolume, error) {
	if _, _, err := d.get(id); err != nil {
		return nil, err
	}
	v := d.stagedVolume(id)
	if v != nil {
		clean := filepath.Clean(path)
		if _, published := v.hint.Targets[clean]; published || v.hint.StagingPath == clean {
			return v, nil
		}
	}
	return nil, fmt.Errorf("%w: volume %s is not at %q", errNotHere, id, path)
}

// NodeExpandVolume implements csi.NodeServer. The image has grown already; the
// device and the filesystem follow.
func (s nodeServer) NodeExpandVolume(ctx context.Context, req *csi.NodeExpandVolumeRequest) (*csi.NodeExpandVolumeResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), required("volume_path", req.GetVolumePath())); err != nil {
		return nil, err
	}
	if c := req.GetVolumeCapability(); c != nil {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	return change(ctx, s.Driver, req.GetVolumeId(), func(ctx context.Context) (*csi.NodeExpandVolumeResponse, error) {
		v, err := s.at(req.GetVolumeId(), req.GetVolumePath())
		if err != nil {
			return nil, err
		}
		if loss := s.lossOf(v); loss != nil {
			return nil, fmt.Errorf("%w: volume %s: %w", errUnavailable, req.GetVolumeId(), loss)
		}
		size := v.disk.Image.Size()
		if r := req.GetCapacityRange(); r.GetRequiredBytes() > size || (r.GetLimitBytes() > 0 && r.GetLimitBytes() < size) {
			return nil, fmt.Errorf("%w: volume %s has %d bytes", errRange, req.GetVolumeId(), size)
		}
		return &csi.NodeExpandVolumeResponse{CapacityBytes: size}, s.growStaged(ctx, v, size)
	})
}

// growStaged makes the device and the filesystem of v size bytes long.
func (d *Driver) growStaged(ctx context.Context, v *stagedVolume, size int64) error {
	if v.device.Size() != size {
		if err := v.device.Resize(ctx, size); err != nil {
			return err
		}
	}
	if v.hint.Block || v.hint.mountsReadOnly() {
		return nil
	}
	mounts, err := d.opts.Host.Mounts(v.hint.StagingPath)
	if err != nil {
		return err
	}
	if len(mounts) == 0 {
		return fmt.Errorf("%w: volume %s is not mounted at %q", errPrecondition, v.hint.Volume, v.hint.StagingPath)
	}
	fstype := mounts[len(mounts)-1].Type
	err = d.opts.Host.Grow(ctx, fstype, v.device.Path(), v.hint.StagingPath)
	if err != nil && !d.opts.Host.GrowsMounted(fstype) {
		return fmt.Errorf("%w: this process lacks CAP_SYS_RESOURCE, which growing a mounted %s needs; it grows when the volume is staged again: %w", errPrecondition, fstype, err)
	}
	return err
}
