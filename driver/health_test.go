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
	pool, err := volume.Open(t.Context(), t.TempDir(), volume.Options{Guard: volume.Guard{WarnAt: 1e-9, StopAt: 1e-9}})
	if err != nil {
		t.Fatal(err)
	}
	v, err := pool.Create(t.Context(), volume.CreateRequest{Name: "v", Params: volume.DefaultParams()})
	if err != nil {
		t.Fatal(err)
	}
	k := newKernel()
	d, err := New(t.Context(), Options{NodeID: "n", Pools: map[string]*volume.Pool{"default": pool},
		Attacher: fakeAttacher{k}, Host: fakeHost{k}, RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := pool.Close(); err != nil {
			t.Error(err)
		}
	})
	storage, err := nodeServer{Driver: d}.NodeGetStorageHealth(t.Context(), &csi.NodeGetStorageHealthRequest{})
	if err != nil || len(storage.GetBackendHealth()) != 1 || storage.GetBackendHealth()[0].GetReason() != reasonPoolFull ||
		!strings.Contains(storage.GetBackendHealth()[0].GetMessage(), "ENOSPC") {
		t.Errorf("health of the storage: %v, %v", storage, err)
	}
	list, err := controllerServer{Driver: d}.ControllerListVolumeHealth(t.Context(), &csi.ControllerListVolumeHealthRequest{})
	if err != nil || len(list.GetEntries()) != 1 || list.GetEntries()[0].GetVolumeId() != v.ID ||
		list.GetEntries()[0].GetHealthStatuses()[0].GetReason() != reasonPoolFull {
		t.Errorf("health of the volumes: %v, %v", list, err)
	}
	room, err := controllerServer{Driver: d}.GetCapacity(t.Context(), &csi.GetCapacityRequest{})
	if err != nil || room.GetAvailableCapacity() != 0 {
		t.Errorf("capacity: %v, %v: want none", room, err)
	}
	if _, err := pool.Create(t.Context(), volume.CreateRequest{Name: "w", Params: volume.DefaultParams()}); err != nil {
		t.Errorf("RefuseAt sets no bound: %v", err)
	}
}
