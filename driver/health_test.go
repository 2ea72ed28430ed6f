package driver

import (
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

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
