//go:build kernelguest

package guest

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// A volume is what a CO knows of one.
type volume struct {
	a       *agent
	name    string
	fs      string // "" for a raw device
	bytes   int64
	params  map[string]string // of its StorageClass
	id      string
	context map[string]string
}

func (v *volume) staging() string { return filepath.Join(v.a.dir, "staging", v.name) }
func (v *volume) target() string  { return filepath.Join(v.a.dir, "target", v.name) }

func (v *volume) capability() *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if v.fs == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: v.fs}}
	}
	return c
}

// create makes a volume, a restore of a snapshot if that is not "".
func (a *agent) create(name, fs string, bytes int64, snapshot string) *volume {
	a.t.Helper()
	return a.createWith(&volume{a: a, name: name, fs: fs, bytes: bytes}, snapshot)
}

func (a *agent) createWith(v *volume, snapshot string) *volume {
	a.t.Helper()
	req := &csi.CreateVolumeRequest{Name: v.name, CapacityRange: &csi.CapacityRange{RequiredBytes: v.bytes},
		VolumeCapabilities: []*csi.VolumeCapability{v.capability()}, Parameters: v.params}
	if snapshot != "" {
		req.VolumeContentSource = &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
			Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}}
	}
	a.call("CreateVolume "+v.name, func(ctx context.Context) error {
		resp, err := a.CreateVolume(ctx, req)
		v.id, v.context = resp.GetVolume().GetVolumeId(), resp.GetVolume().GetVolumeContext()
		return err
	})
	return v
}

func (v *volume) stageOnce(ctx context.Context) error {
	_, err := v.a.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging(), VolumeCapability: v.capability(), VolumeContext: v.context})
	return err
}

func (v *volume) publishOnce(ctx context.Context) error {
	_, err := v.a.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging(), TargetPath: v.target(),
		VolumeCapability: v.capability(), VolumeContext: v.context})
	return err
}

func (v *volume) unpublishOnce(ctx context.Context) error {
	_, err := v.a.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: v.id, TargetPath: v.target()})
	return err
}

func (v *volume) unstageOnce(ctx context.Context) error {
	_, err := v.a.NodeUnstageVolume(ctx, &csi.NodeUnstageVolumeRequest{VolumeId: v.id, StagingTargetPath: v.staging()})
	return err
}

func (v *volume) deleteOnce(ctx context.Context) error {
	_, err := v.a.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: v.id})
	return err
}

// expandOnce grows the volume, its device and its filesystem to v.bytes.
func (v *volume) expandOnce(ctx context.Context) error {
	size := &csi.CapacityRange{RequiredBytes: v.bytes}
	if _, err := v.a.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: v.id, CapacityRange: size}); err != nil {
		return err
	}
	_, err := v.a.NodeExpandVolume(ctx, &csi.NodeExpandVolumeRequest{VolumeId: v.id, VolumePath: v.target(), StagingTargetPath: v.staging(), CapacityRange: size})
	return err
}

// mount stages and publishes v.
func (v *volume) mount() {
	v.a.t.Helper()
	v.a.call("NodeStageVolume "+v.name, v.stageOnce)
	v.a.call("NodePublishVolume "+v.name, v.publishOnce)
}

// unmount undoes mount.
func (v *volume) unmount() {
	v.a.t.Helper()
	v.a.call("NodeUnpublishVolume "+v.name, v.unpublishOnce)
	v.a.call("NodeUnstageVolume "+v.name, v.unstageOnce)
}

// snapshotOnce returns the ID of the snapshot called name.
func (v *volume) snapshotOnce(ctx context.Context, name string) (string, error) {
	resp, err := v.a.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: v.id})
	return resp.GetSnapshot().GetSnapshotId(), err
}

func (v *volume) snapshot(name string) (id string) {
	v.a.t.Helper()
	v.a.call("CreateSnapshot "+name, func(ctx context.Context) (err error) {
		id, err = v.snapshotOnce(ctx, name)
		return err
	})
	return id
}

func (a *agent) deleteSnapshotOnce(ctx context.Context, id string) error {
	_, err := a.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id})
	return err
}

// checkAndDelete checks the filesystem of an unmounted volume, on a raw device, and its image. Then it
// deletes the volume.
func (v *volume) checkAndDelete() {
	t := v.a.t
	t.Helper()
	raw := *v
	raw.fs, raw.name = "", v.name+"-raw"
	raw.mount()
	if v.fs == "xfs" {
		run(t, "xfs_repair", "-n", raw.target())
	} else {
		run(t, "e2fsck", "-fn", raw.target())
	}
	raw.unmount()
	run(t, binary, "img", "check", filepath.Join(v.a.pool, "volumes", v.id, "disk.qcow2"))
	v.a.call("DeleteVolume "+v.name, v.deleteOnce)
}

// health returns the reasons that the health call gives for v.
func (v *volume) health() (reasons []string) {
	v.a.t.Helper()
	v.a.call("NodeGetVolumeHealth "+v.name, func(ctx context.Context) error {
		resp, err := v.a.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: v.id})
		reasons = nil
		for _, e := range resp.GetVolumeHealth().GetHealthStatuses() {
			reasons = append(reasons, e.GetReason())
		}
		return err
	})
	return reasons
}

// mountLine is v's line of the mount table, "" when it is not mounted.
func (v *volume) mountLine() string {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		v.a.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 3 && fields[1] == v.target() {
			return line
		}
	}
	return ""
}

// device is the device node of a staged volume.
func (v *volume) device() string {
	v.a.t.Helper()
	backends, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		v.a.t.Fatal(err)
	}
	for _, path := range backends {
		if b, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(b), v.id+".") {
			return "/dev/" + filepath.Base(filepath.Dir(path))
		}
	}
	v.a.t.Fatalf("%s has no device", v.name)
	return ""
}
