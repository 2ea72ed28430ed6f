package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// A clone of cloneMode=copy shows its progress until it needs its source no more.
func TestCopyMetrics(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil { // writes to it
		t.Fatal(err)
	}
	_, err := r.CreateVolume(t.Context(), &csi.CreateVolumeRequest{Name: "copy", VolumeCapabilities: []*csi.VolumeCapability{mountCap("")},
		Parameters: map[string]string{"cloneMode": "copy"}, VolumeContentSource: fromVolume(id)})
	if err != nil {
		t.Fatal(err)
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(r.driver.Metrics())
	for _, want := range []int{1, 0} {
		for _, name := range []string{"volume_copy_done_ratio", "volume_copy_bytes"} {
			if n, err := testutil.GatherAndCount(registry, metricsPrefix+name); err != nil || n != want {
				t.Errorf("%d of %s, %v; want %d", n, name, err, want)
			}
		}
		if _, err := r.pool.CopyAll(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
