package driver

import (
	"context"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// TestFullPoolIsTold: a pool beyond its marks is told by the health of the
// storage, of its volumes, and by its capacity.
func TestFullPoolIsTold(t *testing.T) {
	r := newGuardedRig(t, volume.Guard{WarnAt: 1e-9, StopAt: 1e-9})
	id := r.volume("v", nil)
	storage, err := r.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(storage.GetBackendHealth()) != 1 || storage.GetBackendHealth()[0].GetReason() != reasonPoolFull ||
		!strings.Contains(storage.GetBackendHealth()[0].GetMessage(), "ENOSPC") {
		t.Errorf("health of the storage: %v, %v", storage, err)
	}
	list, err := r.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
	if err != nil || len(list.GetEntries()) != 1 || list.GetEntries()[0].GetVolumeId() != id ||
		list.GetEntries()[0].GetHealthStatuses()[0].GetReason() != reasonPoolFull {
		t.Errorf("health of the volumes: %v, %v", list, err)
	}
	room, err := r.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	if err != nil || room.GetAvailableCapacity() != 0 {
		t.Errorf("capacity: %v, %v: want none", room, err)
	}
	r.volume("w", nil) // RefuseAt sets no bound
}

// TestReadOnlyPoolIsTold: also when there is room in it, and no more when it is mended.
func TestReadOnlyPoolIsTold(t *testing.T) {
	r := newRig(t)
	c := volume.Capacity{Total: 1 << 30, Available: 1 << 29, ReadOnly: true}
	h := poolHealth(r.pool, c, nil)
	if h.GetReason() != reasonPoolReadOnly || !strings.Contains(h.GetMessage(), r.pool.Path()) {
		t.Errorf("health: %v", h)
	}
	c.ReadOnly = false
	if h := poolHealth(r.pool, c, nil); h != nil {
		t.Errorf("health of a good pool: %v", h)
	}
}

// An attachHook calls during before it attaches.
type attachHook struct {
	Attacher
	during func()
}

func (a attachHook) Attach(ctx context.Context, b nbdexport.Backend, o nbdexport.DeviceOptions) (nbdexport.Device, error) {
	a.during()
	return a.Attacher.Attach(ctx, b, o)
}

// TestLookingAtAVolumeThatIsBeingStaged: it is well, and has no figures yet.
func TestLookingAtAVolumeThatIsBeingStaged(t *testing.T) {
	r := newRig(t)
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(r.driver.Metrics())
	attacher := r.driver.opts.Attacher
	for name, c := range map[string]*csi.VolumeCapability{"mount": mountCap(""), "block": blockCap()} {
		id := r.volume(name, nil)
		looked := false
		r.driver.opts.Attacher = attachHook{attacher, func() {
			looked = true
			h, err := r.NodeGetVolumeHealth(t.Context(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
			if err != nil || len(h.GetVolumeHealth().GetHealthStatuses()) > 0 {
				t.Errorf("%s: health: %v, %v", name, h, err)
			}
			_, err = r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: r.path("staging")})
			wantCode(t, name+": stats", err, codes.Unavailable)
			if _, err := registry.Gather(); err != nil {
				t.Errorf("%s: metrics: %v", name, err)
			}
		}}
		if err := r.stage(id, c); err != nil || !looked {
			t.Errorf("%s: stage: %v, looked: %v", name, err, looked)
		}
		if err := r.unstage(id); err != nil {
			t.Error(err)
		}
	}
}
