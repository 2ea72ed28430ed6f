package driver

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// Reasons of the health RPCs, in CamelCase for machines.
const (
	reasonDeviceLost    = "DeviceLost"      // the device has no server; staging again repairs it
	reasonReturning     = "DeviceReturning" // the node process was restarted and is taking the device over
	reasonUnheld        = "DeviceUnheld"    // the device would be lost with the node process
	reasonRecordDamaged = "RecordDamaged"   // a record or header of the volume does not decode
	reasonImageCorrupt  = "ImageCorrupt"    // a structure of the image contradicts itself
	reasonImageFailed   = "ImageFailed"     // the image could not be opened, written or closed
	reasonPoolFull      = "PoolFull"
	reasonWritesPaused  = "WritesPaused" // writes wait for space in the pool
	reasonPoolUnread    = "PoolUnreachable"
	reasonPoolReadOnly  = "PoolReadOnly"
	reasonUnprotected   = "ProcessUnprotected" // the node process may hang when memory is short
)

// consequence says what a pool's level means to its volumes.
func consequence(pool *volume.Pool, level volume.Level) string {
	switch level {
	case volume.LevelRefuse:
		return "; it takes no new volumes"
	case volume.LevelStop:
		return "; writes that need space " + stopped(pool)
	}
	return ""
}

// stopped says what becomes of writes that a full pool has no space for.
func stopped(pool *volume.Pool) string {
	if pause := pool.Pause(); pause > 0 {
		return fmt.Sprintf("wait until some is freed, and get ENOSPC after %s", pause)
	}
	return "get ENOSPC until some is freed"
}

// poolLowPercent is the share of a pool's space below which it counts as degraded.
const poolLowPercent = 5

// imageHealth turns a known problem of an image into an entry.
func imageHealth(problem error) *csi.VolumeHealth_VolumeHealthEntry {
	e := &csi.VolumeHealth_VolumeHealthEntry{Message: problem.Error()}
	switch {
	case errors.Is(problem, volume.ErrDamaged):
		e.Status, e.Reason = csi.VolumeHealthErrorType_INACCESSIBLE, reasonRecordDamaged
	case errors.Is(problem, qcow2.ErrCorrupt):
		e.Status, e.Reason = csi.VolumeHealthErrorType_DATA_LOSS, reasonImageCorrupt
	default:
		e.Status, e.Reason = csi.VolumeHealthErrorType_DEGRADED, reasonImageFailed
	}
	return e
}

// healthOf collects what is known of the volume id; entries are empty when all is well.
func (d *Driver) healthOf(pool *volume.Pool, id string) (*csi.VolumeHealth, error) {
	problem, err := pool.Health(id)
	if err != nil {
		return nil, err
	}
	h := &csi.VolumeHealth{VolumeId: id}
	if problem != nil {
		h.HealthStatuses = append(h.HealthStatuses, imageHealth(problem))
	}
	if pool.Stopped() {
		h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
			Status: csi.VolumeHealthErrorType_DEGRADED, Reason: reasonPoolFull,
			Message: fmt.Sprintf("pool %q is full: writes that need space %s", pool.Path(), stopped(pool)),
		})
	}
	if v := d.stagedVolume(id); v != nil {
		if v.pause.paused() > 0 {
			h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
				Status: csi.VolumeHealthErrorType_DEGRADED, Reason: reasonWritesPaused,
				Message: fmt.Sprintf("writes wait for space in pool %q", pool.Path()),
			})
		}
		if loss := d.lossOf(v); errors.Is(loss, errAttaching) {
			return h, nil
		} else if loss != nil {
			e := &csi.VolumeHealth_VolumeHealthEntry{
				Status: csi.VolumeHealthErrorType_INACCESSIBLE, Reason: reasonDeviceLost,
				Message: fmt.Sprintf("device %s: %v", v.hint.Device, loss),
			}
			if passing(loss) {
				e.Status, e.Reason = csi.VolumeHealthErrorType_DEGRADED, reasonReturning
			}
			h.HealthStatuses = append(h.HealthStatuses, e)
		} else if mortal := v.device.Survives(); mortal != nil {
			h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{
				Status: csi.VolumeHealthErrorType_DEGRADED, Reason: reasonUnheld,
				Message: fmt.Sprintf("device %s would be lost with the node process: %v", v.hint.Device, mortal),
			})
		}
	}
	return h, nil
}

// volumeHealth is the common part of both GetVolumeHealth RPCs.
func (d *Driver) volumeHealth(id string) (*csi.VolumeHealth, error) {
	if err := required("volume_id", id); err != nil {
		return nil, err
	}
	pool, err := d.pools.of(id)
	if err != nil {
		return nil, err
	}
	return d.healthOf(pool, id)
}

// NodeGetVolumeHealth implements csi.NodeServer.
func (s nodeServer) NodeGetVolumeHealth(_ context.Context, req *csi.NodeGetVolumeHealthRequest) (*csi.NodeGetVolumeHealthResponse, error) {
	h, err := s.volumeHealth(req.GetVolumeId())
	return &csi.NodeGetVolumeHealthResponse{VolumeHealth: h}, err
}

// ControllerGetVolumeHealth implements csi.ControllerServer: a volume has one
// node, which sees it as the controller does.
func (s controllerServer) ControllerGetVolumeHealth(_ context.Context, req *csi.ControllerGetVolumeHealthRequest) (*csi.ControllerGetVolumeHealthResponse, error) {
	h, err := s.volumeHealth(req.GetVolumeId())
	return &csi.ControllerGetVolumeHealthResponse{VolumeHealth: h}, err
}

// ControllerListVolumeHealth implements csi.ControllerServer: the volumes that
// something is wrong with.
func (s controllerServer) ControllerListVolumeHealth(_ context.Context, req *csi.ControllerListVolumeHealthRequest) (*csi.ControllerListVolumeHealthResponse, error) {
	if err := checkPage(req.GetMaxEntries()); err != nil {
		return nil, err
	}
	all, next, err := page(s.pools, req.GetStartingToken(), int(req.GetMaxEntries()), s.unhealthy,
		func(h *csi.VolumeHealth) string { return h.GetVolumeId() })
	if err != nil {
		return nil, err
	}
	return &csi.ControllerListVolumeHealthResponse{Entries: all, NextToken: next}, nil
}

// unhealthy lists the volumes of pool after token that something is wrong with.
func (d *Driver) unhealthy(pool *volume.Pool, token string, limit int) ([]*csi.VolumeHealth, string, error) {
	var all []*csi.VolumeHealth
	for _, id := range pool.IDs() {
		if id <= token {
			continue
		}
		h, err := d.healthOf(pool, id)
		if err != nil || len(h.GetHealthStatuses()) == 0 {
			continue // deleted meanwhile, or well
		}
		if all = append(all, h); limit > 0 && len(all) == limit {
			break
		}
	}
	return all, "", nil
}

// NodeGetStorageHealth implements csi.NodeServer: the pools of this node, and its process.
func (s nodeServer) NodeGetStorageHealth(ctx context.Context, _ *csi.NodeGetStorageHealthRequest) (*csi.NodeGetStorageHealthResponse, error) {
	resp := &csi.NodeGetStorageHealthResponse{}
	for _, w := range s.opts.Warnings {
		resp.BackendHealth = append(resp.BackendHealth, &csi.NodeGetStorageHealthResponse_StorageBackendHealth{
			Status: csi.StorageHealthErrorType_STORAGE_DEGRADED, Reason: reasonUnprotected, Message: w})
	}
	for _, pool := range s.pools.all() {
		c, err := s.poolCapacity(ctx, pool)
		if h := poolHealth(pool, c, err); h != nil {
			resp.BackendHealth = append(resp.BackendHealth, h)
		}
	}
	return resp, nil
}

// poolHealth says what is wrong with pool, which has the capacity c, or cannot be
// asked for err; nil for nothing.
func poolHealth(pool *volume.Pool, c volume.Capacity, err error) *csi.NodeGetStorageHealthResponse_StorageBackendHealth {
	h := &csi.NodeGetStorageHealthResponse_StorageBackendHealth{Status: csi.StorageHealthErrorType_STORAGE_DEGRADED}
	switch {
	case err != nil:
		h.Status, h.Reason = csi.StorageHealthErrorType_STORAGE_UNREACHABLE, reasonPoolUnread
		h.Message = fmt.Sprintf("pool %q: %v", pool.Path(), err)
	case c.ReadOnly:
		h.Reason = reasonPoolReadOnly
		h.Message = fmt.Sprintf("the file system of pool %q is read-only: look why in the kernel's log, mend it and mount it for writing", pool.Path())
	case c.Available < c.Total/100*poolLowPercent || pool.Level(c) > volume.LevelOK:
		h.Reason = reasonPoolFull
		h.Message = fmt.Sprintf("pool %q has %d of %d bytes left%s", pool.Path(), c.Available, c.Total, consequence(pool, pool.Level(c)))
	default:
		return nil
	}
	return h
}
