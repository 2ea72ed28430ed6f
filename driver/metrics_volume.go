package driver

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/meter"
	"csi-qcow2/qcow2"
)

// The metrics of staged volumes.
var (
	volumeTook    = desc("volume_request_duration_seconds", "Time of requests to the volume.", "volume", "kind")
	volumeBytes   = desc("volume_bytes_total", "Bytes that requests to the volume were for.", "volume", "kind")
	volumeErrors  = desc("volume_errors_total", "Requests to the volume that failed.", "volume", "kind")
	volumeDepth   = desc("volume_queue_depth", "Requests to the volume that are under way.", "volume")
	volumePaused  = desc("volume_paused_writes", "Writes to the volume that wait for space in its pool.", "volume")
	volumeServed  = desc("volume_served", "1 while the staged volume's device is served.", "volume", "device", "kind")
	cacheHits     = desc("cache_hits_total", "Metadata tables that were found in the cache.", "volume")
	cacheMisses   = desc("cache_misses_total", "Metadata tables that were read from the image.", "volume")
	cacheEvicted  = desc("cache_evictions_total", "Metadata tables that made room for others.", "volume")
	cacheWrites   = desc("cache_writes_total", "Writes of metadata tables to the image.", "volume")
	cacheSyncs    = desc("cache_syncs_total", "Syncs of the image.", "volume")
	cacheDirty    = desc("cache_dirty_bytes", "Metadata that is not in the image yet.", "volume")
	snapshotSpace = desc("snapshot_unique_bytes", "What deleting the snapshot would give back; looked at now and then, while the volume is staged.", "volume", "snapshot")
	sharedSpace   = desc("volume_shared_bytes", "Space that several states of the volume share, now and then.", "volume")
)

// stagedVolumes returns the staged volumes.
func (d *Driver) stagedVolumes() []*stagedVolume {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]*stagedVolume, 0, len(d.staged))
	for _, v := range d.staged {
		all = append(all, v)
	}
	return all
}

// collectVolume sends the metrics of a staged volume.
func (d *Driver) collectVolume(to chan<- prometheus.Metric, v *stagedVolume) {
	id := v.hint.Volume
	served, kind := 0, ""
	if v.device != nil {
		kind = v.device.Kind()
	}
	if d.lossOf(v) == nil {
		served = 1
	}
	gauge(to, volumeServed, served, id, v.hint.Device, kind)
	gauge(to, volumePaused, v.pause.paused(), id)
	if m, ok := d.meters.Load(id); ok {
		collectRequests(to, id, m.(*meter.Meter))
	}
	if v.disk != nil {
		s := v.disk.Image.CacheStats()
		counter(to, cacheHits, s.Hits, id)
		counter(to, cacheMisses, s.Misses, id)
		counter(to, cacheEvicted, s.Evictions, id)
		counter(to, cacheWrites, s.Writes, id)
		counter(to, cacheSyncs, s.Syncs, id)
		gauge(to, cacheDirty, s.DirtyBytes, id)
	}
	if u, ok := d.usages.Load(id); ok {
		u := u.(qcow2.Usage)
		gauge(to, sharedSpace, u.Shared, id)
		for _, s := range u.Snapshots {
			gauge(to, snapshotSpace, s.Unique, id, s.Name)
		}
	}
}

func collectRequests(to chan<- prometheus.Metric, id string, m *meter.Meter) {
	var depth uint64
	for k := range meter.Kinds {
		s := m.Stats(k)
		depth += s.Begun - s.Requests
		buckets := make(map[float64]uint64, meter.Buckets-1)
		var sum uint64
		for i, n := range s.Times[:meter.Buckets-1] {
			sum += n
			buckets[meter.Bound(i).Seconds()] = sum
		}
		to <- prometheus.MustNewConstHistogram(volumeTook, s.Requests, s.Time.Seconds(), buckets, id, k.String())
		counter(to, volumeErrors, s.Errors, id, k.String())
		if k != meter.Flush {
			counter(to, volumeBytes, s.Bytes, id, k.String())
		}
	}
	gauge(to, volumeDepth, depth, id)
}

const (
	// usageEvery is how often the space of snapshots is looked at.
	usageEvery = 5 * time.Minute
	// usageTimeout bounds one look: it keeps snapshots of the volume waiting.
	usageTimeout = 2 * time.Second
	// usageDelay is how soon after a stage they are looked at, all together.
	usageDelay = 5 * time.Second
)

// SampleUsage looks now and then at who holds the space of staged volumes,
// until ctx ends. An image that takes too long has no such figures.
func (d *Driver) SampleUsage(ctx context.Context) {
	tick := time.NewTicker(usageEvery)
	defer tick.Stop()
	for {
		d.sampleAll(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-d.metrics.look:
			// A volume is being staged; it will be among them in a moment.
			select {
			case <-ctx.Done():
				return
			case <-time.After(usageDelay):
			}
		}
	}
}

// sampleAll looks once at each staged volume.
func (d *Driver) sampleAll(ctx context.Context) {
	for _, v := range d.stagedVolumes() {
		if v.disk == nil {
			continue
		}
		id := v.hint.Volume
		look, cancel := context.WithTimeout(ctx, usageTimeout)
		usage, err := v.disk.Image.SnapshotUsage(look)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			klog.FromContext(ctx).V(4).Info("no figures of the space of snapshots", "volumeID", id, "reason", err.Error())
			d.usages.Delete(id)
		case d.stagedVolume(id) != nil:
			d.usages.Store(id, usage)
		}
	}
}
