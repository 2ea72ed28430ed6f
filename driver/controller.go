package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"k8s.io/klog/v2"

	"csi-qcow2/volume"
)

// controllerServer implements csi.ControllerServer.
type controllerServer struct {
	csi.UnimplementedControllerServer
	*Driver
}

// ControllerGetCapabilities implements csi.ControllerServer.
func (s controllerServer) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	resp := &csi.ControllerGetCapabilitiesResponse{}
	for _, t := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_LIST_VOLUMES,
		csi.ControllerServiceCapability_RPC_GET_CAPACITY,
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_LIST_SNAPSHOTS,
		csi.ControllerServiceCapability_RPC_CLONE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
		csi.ControllerServiceCapability_RPC_GET_VOLUME,
		csi.ControllerServiceCapability_RPC_GET_SNAPSHOT,
		csi.ControllerServiceCapability_RPC_GET_VOLUME_HEALTH,
		csi.ControllerServiceCapability_RPC_LIST_VOLUME_HEALTH,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: t}},
		})
	}
	return resp, nil
}

// foreignPrefix marks StorageClass parameters that are Kubernetes' own; those
// that concern a driver arrive in other fields as well.
const foreignPrefix = "csi.storage.k8s.io/"

// parseParameters returns the pool and the parameters of a StorageClass.
func (d *Driver) parseParameters(m map[string]string) (*volume.Pool, volume.Params, error) {
	own := make(map[string]string, len(m))
	for name, value := range m {
		if !strings.HasPrefix(name, foreignPrefix) {
			own[name] = value
		}
	}
	name, given := own["pool"]
	delete(own, "pool")
	pool, err := d.pools.named(name, given)
	if err != nil {
		return nil, volume.Params{}, err
	}
	params, err := volume.ParseParams(own)
	return pool, params, err
}

// parseSource returns the content source of a volume.
func parseSource(s *csi.VolumeContentSource) (volume.Source, error) {
	if s == nil {
		return volume.Source{}, nil
	}
	source := volume.Source{Volume: s.GetVolume().GetVolumeId(), Snapshot: s.GetSnapshot().GetSnapshotId()}
	if source.Empty() {
		return source, fmt.Errorf("%w: volume_content_source names neither a volume nor a snapshot", errInvalid)
	}
	return source, nil
}

// sizeRange returns the CSI range r, which may be nil.
func sizeRange(r *csi.CapacityRange) volume.SizeRange {
	return volume.SizeRange{Required: r.GetRequiredBytes(), Limit: r.GetLimitBytes()}
}

// newSize returns the size that is asked for a volume without a source. Its
// filesystem must fit, or it could never be staged.
func newSize(r *csi.CapacityRange, caps []*csi.VolumeCapability) (volume.SizeRange, error) {
	size, low := sizeRange(r), minSize(caps)
	if size.Limit > 0 && size.Limit < low && size.Required <= size.Limit {
		return size, fmt.Errorf("%w: limit_bytes is %d, and a volume with these capabilities has %d at least", errRange, size.Limit, low)
	}
	if size.Required > 0 {
		size.Required = max(size.Required, low)
	}
	return size, nil
}

// CreateVolume implements csi.ControllerServer.
func (s controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if err := required("name", req.GetName()); err != nil {
		return nil, err
	}
	if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
		return nil, err
	}
	if len(req.GetMutableParameters()) > 0 {
		return nil, fmt.Errorf("%w: mutable_parameters are not supported", errInvalid)
	}
	pool, params, err := s.parseParameters(req.GetParameters())
	if errors.Is(err, errNoPool) && len(req.GetAccessibilityRequirements().GetRequisite()) > 0 {
		return nil, fmt.Errorf("%w: %w", errTopology, err) // another node may have it
	}
	if err != nil {
		return nil, err
	}
	source, err := parseSource(req.GetVolumeContentSource())
	if err != nil {
		return nil, err
	}
	if err := s.checkSource(pool, source); err != nil {
		return nil, err
	}
	if err := s.checkTopology(req.GetAccessibilityRequirements()); err != nil {
		return nil, err
	}
	if err := s.checkUnique(pool, req.GetName(), (*volume.Pool).VolumeNamed); err != nil {
		return nil, err
	}
	size := sizeRange(req.GetCapacityRange())
	if source.Empty() {
		if size, err = newSize(req.GetCapacityRange(), req.GetVolumeCapabilities()); err != nil {
			return nil, err
		}
	}
	if source.Volume != "" {
		s.syncStaged(ctx, source.Volume)
	}
	v, err := pool.Create(ctx, volume.CreateRequest{
		Name: req.GetName(), Size: size, Params: params, Source: source,
		Quiesce: s.quiesce(ctx, source.Volume),
	})
	if err != nil {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("volume exists", "volumeID", v.ID, "name", v.Name, "bytes", v.Size)
	return &csi.CreateVolumeResponse{Volume: s.csiVolume(v)}, nil
}

// checkSource refuses a source that is unknown or lies in another pool.
func (d *Driver) checkSource(pool *volume.Pool, source volume.Source) error {
	for _, id := range []string{source.Volume, source.Snapshot} {
		if id == "" {
			continue
		}
		from, err := d.pools.of(id)
		if err != nil {
			return err
		}
		if from != pool {
			return fmt.Errorf("%w: source %s is in another pool", errInvalid, id)
		}
	}
	return nil
}

// csiVolume describes v to a CO.
func (d *Driver) csiVolume(v volume.Volume) *csi.Volume {
	out := &csi.Volume{VolumeId: v.ID, CapacityBytes: v.Size, AccessibleTopology: []*csi.Topology{d.topology()}}
	switch {
	case v.Source.Snapshot != "":
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: v.Source.Snapshot}}}
	case v.Source.Volume != "":
		out.ContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{
			Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: v.Source.Volume}}}
	}
	return out
}

// DeleteVolume implements csi.ControllerServer. A volume that is not in its pool is
// deleted already, and so is what has no ID of ours.
func (s controllerServer) DeleteVolume(ctx context.Context, req *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	_, err := change(ctx, s.Driver, req.GetVolumeId(), func(ctx context.Context) (any, error) {
		pool, err := s.pools.here(req.GetVolumeId())
		if err != nil {
			return nil, err
		}
		if v := s.stagedVolume(req.GetVolumeId()); v != nil {
			return nil, fmt.Errorf("%w: volume %s is staged at %q", errPrecondition, v.hint.Volume, v.hint.StagingPath)
		}
		return nil, pool.Delete(ctx, req.GetVolumeId())
	})
	if err != nil && !errors.Is(err, volume.ErrNotFound) {
		return nil, err
	}
	klog.FromContext(ctx).V(2).Info("volume is deleted", "volumeID", req.GetVolumeId())
	return &csi.DeleteVolumeResponse{}, nil
}

// get returns the volume of an RPC that requires one.
func (d *Driver) get(id string) (*volume.Pool, volume.Volume, error) {
	if err := required("volume_id", id); err != nil {
		return nil, volume.Volume{}, err
	}
	pool, err := d.pools.of(id)
	if err != nil {
		return nil, volume.Volume{}, err
	}
	v, err := pool.Get(id)
	return pool, v, err
}

// ControllerGetVolume implements csi.ControllerServer.
func (s controllerServer) ControllerGetVolume(_ context.Context, req *csi.ControllerGetVolumeRequest) (*csi.ControllerGetVolumeResponse, error) {
	_, v, err := s.get(req.GetVolumeId())
	if err != nil {
		return nil, err
	}
	return &csi.ControllerGetVolumeResponse{Volume: s.csiVolume(v), Status: &csi.ControllerGetVolumeResponse_VolumeStatus{}}, nil
}

// ValidateVolumeCapabilities implements csi.ControllerServer.
func (s controllerServer) ValidateVolumeCapabilities(_ context.Context, req *csi.ValidateVolumeCapabilitiesRequest) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if len(req.GetVolumeCapabilities()) == 0 {
		return nil, fmt.Errorf("%w: volume_capabilities are missing", errInvalid)
	}
	if _, _, err := s.get(req.GetVolumeId()); err != nil {
		return nil, err
	}
	err := checkCapabilities(req.GetVolumeCapabilities())
	if err == nil && len(req.GetMutableParameters()) > 0 {
		err = fmt.Errorf("%w: mutable_parameters are not supported", errInvalid)
	}
	if err == nil {
		_, _, err = s.parseParameters(req.GetParameters())
	}
	if err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{
		Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
			VolumeContext:      req.GetVolumeContext(),
			VolumeCapabilities: req.GetVolumeCapabilities(),
			Parameters:         req.GetParameters(),
		},
	}, nil
}

// ListVolumes implements csi.ControllerServer. A token is the last ID of a
// page, so volumes may come and go between pages.
func (s controllerServer) ListVolumes(_ context.Context, req *csi.ListVolumesRequest) (*csi.ListVolumesResponse, error) {
	if err := checkPage(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	all, next, err := page(s.pools, req.GetStartingToken(), int(req.GetMaxEntries()),
		func(pool *volume.Pool, token string, limit int) ([]volume.Volume, string, error) {
			return pool.List(token, limit)
		},
		func(v volume.Volume) string { return v.ID })
	if err != nil {
		return nil, err
	}
	resp := &csi.ListVolumesResponse{NextToken: next}
	for _, v := range all {
		resp.Entries = append(resp.Entries, &csi.ListVolumesResponse_Entry{
			Volume: s.csiVolume(v), Status: &csi.ListVolumesResponse_VolumeStatus{}})
	}
	return resp, nil
}

// page collects up to limit items (0 for all) of all pools that follow the
// token, pool by pool. The token names its pool by the ID in it.
func page[T any](p pools, token string, limit int, list func(*volume.Pool, string, int) ([]T, string, error), id func(T) string) ([]T, string, error) {
	pools := p.all()
	if token != "" {
		from, err := p.of(token)
		if err != nil {
			return nil, "", fmt.Errorf("%w: %q", volume.ErrBadToken, token)
		}
		for pools[0] != from {
			pools = pools[1:]
		}
	}
	var all []T
	for i, pool := range pools {
		room := 0
		if limit > 0 {
			// One more than asked for tells whether there is a next page.
			if room = limit - len(all) + 1; room == 0 {
				break
			}
		}
		if i > 0 {
			token = ""
		}
		items, _, err := list(pool, token, room)
		if err != nil {
			return nil, "", err
		}
		all = append(all, items...)
	}
	if limit > 0 && len(all) > limit {
		return all[:limit], id(all[limit-1]), nil
	}
	return all, "", nil
}

// GetCapacity implements csi.ControllerServer. Volumes are thin: without an
// over-commit bound, what is available bounds what can be written, not what can
// be promised.
func (s controllerServer) GetCapacity(ctx context.Context, req *csi.GetCapacityRequest) (*csi.GetCapacityResponse, error) {
	if len(req.GetVolumeCapabilities()) > 0 {
		if err := checkCapabilities(req.GetVolumeCapabilities()); err != nil {
			return &csi.GetCapacityResponse{}, nil
		}
	}
	if t := req.GetAccessibleTopology(); t != nil && !s.holds(t) {
		return &csi.GetCapacityResponse{}, nil
	}
	pool, _, err := s.parseParameters(req.GetParameters())
	if errors.Is(err, errNoPool) {
		return &csi.GetCapacityResponse{}, nil // another node may have it
	}
	if err != nil {
		return nil, err
	}
	c, err := s.poolCapacity(ctx, pool)
	if err != nil {
		return nil, err
	}
	return &csi.GetCapacityResponse{AvailableCapacity: pool.Room(c), MinimumVolumeSize: wrapperspb.Int64(minSize(req.GetVolumeCapabilities()))}, nil
}

// ControllerExpandVolume implements csi.ControllerServer. It grows the image,
// attached or not; the node half follows with the device and the filesystem.
func (s controllerServer) ControllerExpandVolume(ctx context.Context, req *csi.ControllerExpandVolumeRequest) (*csi.ControllerExpandVolumeResponse, error) {
	if err := required("volume_id", req.GetVolumeId()); err != nil {
		return nil, err
	}
	if req.GetCapacityRange() == nil {
		return nil, fmt.Errorf("%w: capacity_range is missing", errInvalid)
	}
	if c := req.GetVolumeCapability(); c != nil {
		if err := checkCapability(c); err != nil {
			return nil, err
		}
	}
	return change(ctx, s.Driver, req.GetVolumeId(), func(ctx context.Context) (*csi.ControllerExpandVolumeResponse, error) {
		pool, _, err := s.get(req.GetVolumeId())
		if err != nil {
			return nil, err
		}
		v, err := pool.Expand(ctx, req.GetVolumeId(), sizeRange(req.GetCapacityRange()))
		if err != nil {
			return nil, err
		}
		// The node half also runs for a volume that is not staged: at its next stage.
		return &csi.ControllerExpandVolumeResponse{CapacityBytes: v.Size, NodeExpansionRequired: true}, nil
	})
}
