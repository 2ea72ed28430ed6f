package driver

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestMetrics scrapes a node with a staged volume, its snapshot and a clone.
func TestMetrics(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	snap, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	r.volume("clone", fromVolume(id))
	if _, err := r.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: "x"}); err == nil {
		t.Fatal("there is a volume x")
	}
	v := r.driver.stagedVolume(id)
	backend := v.device.(*fakeDevice).backend
	if _, err := backend.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	if err := backend.Flush(); err != nil {
		t.Fatal(err)
	}
	r.driver.sampleAll(t.Context())

	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(r.driver.Metrics())
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), metricsPrefix)
			for _, l := range m.GetLabel() {
				if l.GetName() != "volume" && l.GetName() != "pool" && l.GetName() != "device" {
					name += " " + l.GetValue()
				}
			}
			switch {
			case m.GetHistogram() != nil:
				got[name] += float64(m.GetHistogram().GetSampleCount())
			case m.GetCounter() != nil:
				got[name] += m.GetCounter().GetValue()
			default:
				got[name] += m.GetGauge().GetValue()
			}
		}
	}
	for name, want := range map[string]float64{
		"volume_request_duration_seconds write":        1,
		"volume_request_duration_seconds flush":        1,
		"volume_request_duration_seconds read":         0,
		"volume_bytes_total write":                     4096,
		"volume_errors_total write":                    0,
		"volume_queue_depth":                           0,
		"volume_served fuse":                           1,
		"csi_calls_total OK CreateVolume":              2,
		"csi_calls_total OK CreateSnapshot":            1,
		"csi_call_duration_seconds NodeStageVolume":    1,
		"csi_calls_total NotFound ControllerGetVolume": 1,
		"pool_up":               1,
		"pool_volumes none":     1,
		"pool_volumes volume":   1,
		"pool_volumes snapshot": 0,
		"pool_snapshots":        1,
		"pool_level":            0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (there: %v), want %v", name, v, ok, want)
		}
	}
	for _, name := range []string{"pool_capacity_bytes", "pool_available_bytes", "pool_provisioned_bytes", "pool_overcommit_ratio", "pool_room_bytes",
		"volume_allocated_bytes none", "volume_allocated_bytes volume", "volume_size_bytes", "cache_syncs_total"} {
		if got[name] <= 0 {
			t.Errorf("%s is %v", name, got[name])
		}
	}
	if _, ok := got["snapshot_unique_bytes "+snap.GetSnapshot().GetSnapshotId()]; !ok {
		t.Errorf("no space of the snapshot; there are %v", got)
	}
	// What is not staged any more has no figures of requests.
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"volume_request_duration_seconds", "volume_queue_depth", "snapshot_unique_bytes"} {
		if n, err := testutil.GatherAndCount(registry, metricsPrefix+name); err != nil || n != 0 {
			t.Errorf("%d of %s after unstage, %v", n, name, err)
		}
	}
}

// TestCallsAreCountedWithTheirCode: also of a handler that panics.
func TestCallsAreCountedWithTheirCode(t *testing.T) {
	r := newRig(t)
	if _, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{MaxEntries: -1}); err == nil {
		t.Fatal("a negative page is listed")
	}
	want := `
# HELP csi_qcow2_csi_calls_total CSI calls that have ended.
# TYPE csi_qcow2_csi_calls_total counter
csi_qcow2_csi_calls_total{code="InvalidArgument",method="ListVolumes"} 1
`
	if err := testutil.CollectAndCompare(r.driver.metrics.calls, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
}
