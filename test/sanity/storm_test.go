package sanity

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TestKilledDuringRPCs kills the process again and again while many callers
// create, clone, snapshot and delete. Nothing is corrupt, nothing is lost sight of.
func TestKilledDuringRPCs(t *testing.T) {
	p := newProcess(t)
	for round := range 8 {
		p.start()
		k := newKubelet(p)
		callers, stop := context.WithCancel(context.Background())
		var running sync.WaitGroup
		var done atomic.Int64
		for caller := range 8 {
			random := rand.New(rand.NewPCG(uint64(round), uint64(caller)))
			running.Go(func() { // ends with callers
				for callers.Err() == nil {
					if k.any(callers, random) == nil {
						done.Add(1)
					}
				}
			})
		}
		p.wait("calls to succeed", func() bool { return done.Load() > int64(20+7*round) })
		if err := p.signal(syscall.SIGKILL); err == nil {
			t.Fatal("the process ended well after SIGKILL")
		}
		stop()
		running.Wait()
		k.conn.Close()
	}
	if err := p.restartCleanly(); err != nil { // nothing is at work in the pool then
		t.Fatal(err)
	}
	for _, image := range images(t, p) {
		if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", image).CombinedOutput(); err != nil && exitCode(err) != leaksOnly {
			t.Errorf("qemu-img check %s: %v\n%s", image, err, out)
		}
	}
	p.start()
	k := newKubelet(p)
	list, err := k.ListVolumes(k.rpc(), &csi.ListVolumesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list.GetEntries() {
		k.deleteVolume(e.GetVolume().GetVolumeId())
	}
	snapshots := k.snapshots()
	for _, id := range snapshots {
		k.deleteSnapshot(id)
	}
	t.Logf("%d volumes and %d snapshots at the end", len(list.GetEntries()), len(snapshots))
	k.finish()
}

// restartCleanly starts the process and stops it again.
func (p *process) restartCleanly() error {
	p.start()
	return p.signal(syscall.SIGTERM)
}

// leaksOnly is the exit status of qemu-img check for an image that lost space
// and nothing else.
const leaksOnly = 3

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// images lists the images of the pool, views and creations included.
func images(t *testing.T, p *process) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(p.pool(), func(path string, _ os.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".qcow2" {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// any makes one random call on a few names.
func (k *kubelet) any(ctx context.Context, random *rand.Rand) error {
	name := fmt.Sprint("v", random.IntN(5))
	request := &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, VolumeCapabilities: []*csi.VolumeCapability{capability("ext4")}}
	switch random.IntN(5) {
	case 0:
		_, err := k.CreateVolume(ctx, request)
		return err
	case 1:
		list, err := k.ListVolumes(ctx, &csi.ListVolumesRequest{})
		if n := len(list.GetEntries()); n > 0 {
			request.Name = "clone-" + name
			request.VolumeContentSource = fromVolume(list.GetEntries()[random.IntN(n)].GetVolume().GetVolumeId())
			_, err = k.CreateVolume(ctx, request)
		}
		return err
	case 2:
		list, err := k.ListVolumes(ctx, &csi.ListVolumesRequest{})
		if n := len(list.GetEntries()); n > 0 {
			_, err = k.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: list.GetEntries()[random.IntN(n)].GetVolume().GetVolumeId()})
		}
		return err
	case 3:
		list, err := k.ListVolumes(ctx, &csi.ListVolumesRequest{})
		if n := len(list.GetEntries()); n > 2 {
			_, err = k.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: list.GetEntries()[random.IntN(n)].GetVolume().GetVolumeId()})
		}
		return err
	default:
		list, err := k.ListSnapshots(ctx, &csi.ListSnapshotsRequest{})
		if n := len(list.GetEntries()); n > 2 {
			_, err = k.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: list.GetEntries()[random.IntN(n)].GetSnapshot().GetSnapshotId()})
		}
		return err
	}
}
