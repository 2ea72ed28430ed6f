package driver

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"csi-qcow2/volume"
)

// The metrics of pools.
var (
	poolUp          = desc("pool_up", "1 if the pool's file system answers.", "pool")
	poolCapacity    = desc("pool_capacity_bytes", "Size of the pool's file system.", "pool")
	poolAvailable   = desc("pool_available_bytes", "Space that is left in the pool's file system.", "pool")
	poolProvisioned = desc("pool_provisioned_bytes", "Virtual sizes of the pool's volumes together.", "pool")
	poolOvercommit  = desc("pool_overcommit_ratio", "Virtual sizes of the pool's volumes together, in terms of the size of its file system.", "pool")
	poolBound       = desc("pool_overcommit_limit", "Bound of pool_overcommit_ratio; 0 for none.", "pool")
	poolRoom        = desc("pool_room_bytes", "Size that a new volume of the pool may have.", "pool")
	poolLevel       = desc("pool_level", "How full the pool is: 0 well, 1 warn, 2 no new volumes, 3 guest writes that need space wait or are refused.", "pool")
	poolRefused     = desc("pool_refused_writes_total", "Guest writes that were refused to keep the pool's file system from filling up.", "pool")
	poolVolumes     = desc("pool_volumes", "Volumes of the pool, by what they were made from: nothing, a snapshot, a volume.", "pool", "source")
	poolSnapshots   = desc("pool_snapshots", "Snapshots of the pool.", "pool")
	poolTombstones  = desc("pool_tombstones", "Deleted volumes that a snapshot or clone still needs.", "pool")

	volumeAllocated = desc("volume_allocated_bytes", "Space of the volume's image in the pool's file system, with its snapshots.", "volume", "pool", "source")
	volumeSize      = desc("volume_size_bytes", "Virtual size of the volume.", "volume", "pool")
	copyDone        = desc("volume_copy_done_ratio", "Share of a clone of cloneMode=copy that does not need its source any more; gone when none does.", "volume", "pool")
	copyCopied      = desc("volume_copy_bytes", "Bytes that the background copy of a clone has copied.", "volume", "pool")
)

// A poolLook is what one look at a pool finds.
type poolLook struct {
	capacity volume.Capacity
	space    volume.Space
}

// collectPool sends the metrics of a pool and of the space of its volumes.
func (d *Driver) collectPool(to chan<- prometheus.Metric, name string) {
	pool := d.pools.byName[name]
	gauge(to, poolBound, pool.Overcommit(), name)
	counter(to, poolRefused, pool.Refused(), name)
	for _, c := range pool.Copies() {
		gauge(to, copyDone, float64(c.Done)/float64(max(c.Size, 1)), c.Volume, name)
		gauge(to, copyCopied, c.Copied, c.Volume, name)
	}
	look := new(poolLook) // it may be filled after the scrape has gone on
	err := d.probes.run(context.Background(), "metrics of "+pool.Path(), func() (err error) {
		if look.capacity, err = pool.Capacity(); err != nil {
			return err
		}
		look.space, err = pool.Space()
		return err
	})
	if err != nil {
		gauge(to, poolUp, 0, name)
		return
	}
	gauge(to, poolUp, 1, name)
	gauge(to, poolCapacity, look.capacity.Total, name)
	gauge(to, poolAvailable, look.capacity.Available, name)
	gauge(to, poolProvisioned, look.space.Provisioned, name)
	gauge(to, poolOvercommit, float64(look.space.Provisioned)/float64(max(look.capacity.Total, 1)), name)
	gauge(to, poolRoom, pool.Room(look.capacity), name)
	gauge(to, poolLevel, int(pool.Level(look.capacity)), name)
	gauge(to, poolSnapshots, look.space.Snapshots, name)
	gauge(to, poolTombstones, look.space.Tombstones, name)
	bySource := map[string]int{"none": 0, "snapshot": 0, "volume": 0}
	for _, v := range look.space.Volumes {
		source := sourceKind(v.Source)
		bySource[source]++
		gauge(to, volumeAllocated, v.Allocated, v.ID, name, source)
		gauge(to, volumeSize, v.Size, v.ID, name)
	}
	for source, n := range bySource {
		gauge(to, poolVolumes, n, name, source)
	}
}

func sourceKind(s volume.Source) string {
	switch {
	case s.Snapshot != "":
		return "snapshot"
	case s.Volume != "":
		return "volume"
	}
	return "none"
}
