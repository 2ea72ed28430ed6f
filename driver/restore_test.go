package driver

import (
	"context"
	"slices"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/volume"
)

// replace replaces the driver as the death of its process does where the kernel keeps devices (nbd).
func (r *rig) replace() {
	r.t.Helper()
	r.stop()
	r.start()
}

// reasons returns what the health call says of a volume.
func (r *rig) reasons(id string) []string {
	r.t.Helper()
	resp, err := r.NodeGetVolumeHealth(r.t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
	if err != nil {
		r.t.Fatal(err)
	}
	var reasons []string
	for _, e := range resp.GetVolumeHealth().GetHealthStatuses() {
		reasons = append(reasons, e.GetReason())
	}
	return reasons
}

// TestRestoreGoesOn: a device that the kernel has kept is served again, and calls go on where they were.
func TestRestoreGoesOn(t *testing.T) {
	for _, c := range []*csi.VolumeCapability{mountCap(fsExt4), blockCap()} {
		r := newRig(t)
		id := r.volume("v", nil)
		if err := r.stage(id, c); err != nil {
			t.Fatal(err)
		}
		device := r.driver.stagedVolume(id).hint.Device
		for range 2 {
			r.replace()
			if reasons := r.reasons(id); len(reasons) > 0 {
				t.Errorf("health: %q", reasons)
			}
			if got := r.driver.stagedVolume(id).device.Path(); got != device {
				t.Errorf("device %s, was %s", got, device)
			}
			if err := r.stage(id, c); err != nil {
				t.Errorf("stage again: %v", err)
			}
			if err := r.publish(id, c); err != nil {
				t.Errorf("publish: %v", err)
			}
		}
		if err := r.unpublish(id); err != nil {
			t.Error(err)
		}
		if err := r.unstage(id); err != nil {
			t.Error(err)
		}
		r.wantClean()
		if c.GetMount() != nil && r.kernel.formats[id] != 1 {
			t.Errorf("formatted %d times", r.kernel.formats[id])
		}
	}
}

// TestRestoreNeedsTheCache: a device whose last writes were lost with a cache is not served; a new stage repairs.
func TestRestoreNeedsTheCache(t *testing.T) {
	for _, lost := range []func(r *rig, id string){
		func(r *rig, _ string) { r.cache = "another" },
		func(r *rig, id string) { // an end in disorder
			v := *r.driver.stagedVolume(id)
			v.hint.Lost = true
			if err := r.driver.remember(&v); err != nil {
				r.t.Fatal(err)
			}
		},
	} {
		r := newRig(t)
		id := r.volume("v", nil)
		if err := r.stage(id, mountCap(fsExt4)); err != nil {
			t.Fatal(err)
		}
		old := r.driver.stagedVolume(id).hint.deviceID()
		lost(r, id)
		r.replace()
		if reasons := r.reasons(id); !slices.Contains(reasons, reasonDeviceLost) {
			t.Errorf("health: %q, want %s", reasons, reasonDeviceLost)
		}
		r.kernel.die() // the kernel has waited long enough
		if err := r.stage(id, mountCap(fsExt4)); err != nil {
			t.Fatalf("stage after the loss: %v", err)
		}
		if reasons := r.reasons(id); len(reasons) > 0 {
			t.Errorf("health after the repair: %q", reasons)
		}
		if v := r.driver.stagedVolume(id); v.hint.deviceID() == old || v.hint.Lost || v.hint.Cache != r.cache {
			t.Errorf("the hint is that of the lost device: %+v", v.hint)
		}
		if err := r.unstage(id); err != nil {
			t.Error(err)
		}
		r.wantClean()
	}
}

// TestCallsBeforeRestore: a volume that is not back is not touched, and its callers are asked to come again.
func TestCallsBeforeRestore(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	other := r.volume("other", nil)
	if err := r.stage(id, mountCap(fsExt4)); err != nil {
		t.Fatal(err)
	}
	r.defers = true
	r.replace()
	if reasons := r.reasons(id); !slices.Contains(reasons, reasonReturning) {
		t.Errorf("health: %q, want %s", reasons, reasonReturning)
	}
	_, deleting := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	_, stats := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: r.path("staging")})
	for name, err := range map[string]error{"stage": r.stage(id, mountCap(fsExt4)), "unstage": r.unstage(id), "delete": deleting, "stats": stats} {
		if code := status.Code(err); code != codes.Aborted && code != codes.Unavailable {
			t.Errorf("%s: %v, want ABORTED or UNAVAILABLE", name, err)
		}
	}
	if _, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: other}); err != nil {
		t.Errorf("another volume: %v", err)
	}
	r.driver.Restore(t.Context())
	if err := r.unstage(id); err != nil {
		t.Error(err)
	}
	r.wantClean()
}

// TestHeldDeviceIsRemovedLater: the device of a lost volume that somebody has open stays while the volume is staged
// again, and goes when it is not open any more.
func TestHeldDeviceIsRemovedLater(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	old := r.driver.stagedVolume(id).hint.Device
	hold := func(held bool) {
		r.kernel.mu.Lock()
		defer r.kernel.mu.Unlock()
		r.kernel.devices[old].held = held
	}
	there := func() bool {
		r.kernel.mu.Lock()
		defer r.kernel.mu.Unlock()
		return r.kernel.devices[old] != nil
	}
	hold(true)
	r.kernel.die()
	r.replace()
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	r.driver.removeUnknown(t.Context())
	if !there() {
		t.Fatal("a device that is open was removed")
	}
	hold(false)
	r.driver.removeUnknown(t.Context())
	if there() {
		t.Error("a device that nobody knows is left")
	}
	if err := r.unstage(id); err != nil {
		t.Error(err)
	}
	r.wantClean()
}

// TestRestoreWithoutThePool: a volume whose pool this process has not is not given up;
// the next one, which has it, goes on with the device.
func TestRestoreWithoutThePool(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	r.stop()
	pool := r.pool
	other, err := volume.Open(t.Context(), t.TempDir(), volume.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r.pool, r.defers = other, true
	r.start()
	_, err = r.driver.reattach(t.Context(), r.driver.returning[0].v)
	if err == nil || final(err) || codeOf(err) != codes.Unavailable {
		t.Errorf("take over without the pool: %v, want to try again", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	r.driver.Restore(ended)
	r.stop()
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	r.pool, r.defers = pool, false
	r.start()
	if reasons := r.reasons(id); len(reasons) > 0 {
		t.Errorf("health with the pool: %q", reasons)
	}
}
