package driver

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"csi-qcow2/volume"
)

// probeTimeout bounds a look at a filesystem: a dead device or a dead NFS
// server hangs its callers for ever.
const probeTimeout = 5 * time.Second

// probes runs looks at filesystems that may never return, one at a time for each key.
type probes struct{ running sync.Map } // *probe by key

// A probe is a look under way.
type probe struct {
	begun time.Time
	done  chan struct{} // closed when it has returned
}

// run runs fn and waits for it, at most probeTimeout; first, for an earlier look.
// One that has taken that long already is not waited for.
func (p *probes) run(ctx context.Context, key string, fn func() error) error {
	mine := &probe{time.Now(), make(chan struct{})}
	for {
		other, busy := p.running.LoadOrStore(key, mine)
		if !busy {
			break
		}
		if err := other.(*probe).wait(ctx, key); err != nil {
			return err
		}
	}
	var err error
	go func() { // ends when the kernel answers
		err = fn()
		p.running.Delete(key)
		close(mine.done)
	}()
	if waitErr := mine.wait(ctx, key); waitErr != nil {
		return waitErr
	}
	return err
}

// wait waits for the end of a look, until probeTimeout after its begin.
func (p *probe) wait(ctx context.Context, key string) error {
	timeout := time.NewTimer(time.Until(p.begun.Add(probeTimeout)))
	defer timeout.Stop()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout.C:
		return fmt.Errorf("%w: %s: no answer in %s", errUnavailable, key, probeTimeout)
	}
}

// poolCapacity is volume.Pool.Capacity, bounded.
func (d *Driver) poolCapacity(ctx context.Context, pool *volume.Pool) (volume.Capacity, error) {
	// The look may end after its caller has left: it gets a place of its own.
	result := new(volume.Capacity)
	err := d.probes.run(ctx, "statfs "+pool.Path(), func() (err error) {
		*result, err = pool.Capacity()
		return err
	})
	if err != nil {
		return volume.Capacity{}, err
	}
	return *result, nil
}

// NodeGetVolumeStats implements csi.NodeServer. It never hangs on a dead device.
func (s nodeServer) NodeGetVolumeStats(ctx context.Context, req *csi.NodeGetVolumeStatsRequest) (*csi.NodeGetVolumeStatsResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), required("volume_path", req.GetVolumePath())); err != nil {
		return nil, err
	}
	v, err := s.at(req.GetVolumeId(), req.GetVolumePath())
	if err != nil {
		return nil, err
	}
	if loss := s.lossOf(v); loss != nil {
		return nil, fmt.Errorf("%w: volume %s: %w", errUnavailable, req.GetVolumeId(), loss)
	}
	if v.hint.Block {
		return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{{Unit: csi.VolumeUsage_BYTES, Total: v.device.Size()}}}, nil
	}
	u := new(Usage)
	err = s.probes.run(ctx, "statfs "+v.hint.Volume, func() (err error) {
		*u, err = s.opts.Host.Usage(v.hint.StagingPath)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{Unit: csi.VolumeUsage_BYTES, Total: u.Total, Available: u.Available, Used: u.Used},
		{Unit: csi.VolumeUsage_INODES, Total: u.Inodes, Available: u.InodesFree, Used: u.InodesUsed},
	}}, nil
}
