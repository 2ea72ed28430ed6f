package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestASickPoolDoesNotRestartThePlugin: the pool does not answer, the probe
// does, and the health of the storage says why.
func TestASickPoolDoesNotRestartThePlugin(t *testing.T) {
	r := newRig(t)
	// A look at the pool that hangs, as on a dead NFS server.
	if _, hung := r.driver.probes.running.LoadOrStore("statfs "+r.pool.Path(), new(probe)); hung {
		t.Fatal("somebody is looking already")
	}
	probe, err := r.Probe(t.Context(), &csi.ProbeRequest{})
	if err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe: %v, %v: want it ready", probe, err)
	}
	health, err := r.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(health.GetBackendHealth()) == 0 || health.GetBackendHealth()[0].GetReason() != reasonPoolUnread {
		t.Errorf("health of the storage: %v, %v: want %s", health, err, reasonPoolUnread)
	}
}
