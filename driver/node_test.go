package driver

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"csi-qcow2/internal/durable"
	"csi-qcow2/volume"
)

// wantCode checks the code of an RPC.
func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: got %s (%v), want %s", what, got, err, want)
	}
}

// No more volumes are staged than the node may have, also when they are staged at once.
func TestStageLimit(t *testing.T) {
	const limit, volumes = 5, 20 // limit is the rig's
	r := newRig(t)
	begin, ended := make(chan struct{}), make(chan codes.Code, volumes)
	for i := range volumes {
		req := r.stageRequest(r.volume(fmt.Sprint("v", i), nil), mountCap(""))
		req.StagingTargetPath = r.path(fmt.Sprint("staging", i))
		go func() { // ends when its call does
			<-begin
			_, err := r.NodeStageVolume(t.Context(), req)
			ended <- status.Code(err)
		}()
	}
	close(begin)
	got := make(map[codes.Code]int)
	for range volumes {
		got[<-ended]++
	}
	if got[codes.OK] != limit || got[codes.ResourceExhausted] != volumes-limit {
		t.Errorf("%d volumes at once: got %v, want %d staged", volumes, got, limit)
	}
}

// TestNodeStepsKilled kills the driver at each change of stage, publish,
// unpublish and unstage; the next driver repeats the RPC. At the end the volume is
// published exactly once, or gone, and was formatted by rule.
func TestNodeStepsKilled(t *testing.T) {
	for _, c := range []struct {
		name string
		cap  func() *csi.VolumeCapability
		ro   bool
	}{
		{"filesystem", func() *csi.VolumeCapability { return mountCap("ext4") }, false},
		{"filesystem read-only target", func() *csi.VolumeCapability { return mountCap("") }, true},
		{"block", blockCap, false},
		{"block read-only target", blockCap, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			kills := 0
			for ; ; kills++ {
				id := r.volume(fmt.Sprint("v", kills), nil)
				up := func() error {
					if err := r.stage(id, c.cap()); err != nil {
						return err
					}
					req := r.publishRequest(id, c.cap())
					req.Readonly = c.ro
					_, err := r.NodePublishVolume(t.Context(), req)
					return err
				}
				down := func() error {
					if err := r.unpublish(id); err != nil {
						return err
					}
					return r.unstage(id)
				}
				r.kernel.arm(kills)
				err := up()
				killedUp := r.kernel.died()
				if !killedUp && err != nil {
					t.Fatalf("up: %v", err)
				}
				if killedUp {
					r.restart()
					if err := up(); err != nil {
						t.Fatalf("kill %d: up again: %v", kills, err)
					}
				}
				r.kernel.arm(-1)
				if err := up(); err != nil {
					t.Fatalf("kill %d: up twice: %v", kills, err)
				}
				r.wantPublished(c.ro, c.cap().GetBlock() != nil)
				r.kernel.arm(kills)
				err = down()
				killedDown := r.kernel.died()
				if !killedDown && err != nil {
					t.Fatalf("down: %v", err)
				}
				if killedDown {
					r.restart()
				}
				r.kernel.arm(-1)
				for range 2 {
					if err := down(); err != nil {
						t.Fatalf("kill %d: down again: %v", kills, err)
					}
				}
				r.wantClean()
				if _, err := os.Lstat(r.path("target")); !errors.Is(err, os.ErrNotExist) {
					t.Fatalf("kill %d: the target is left: %v", kills, err)
				}
				if _, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
					t.Fatal(err)
				}
				if !killedUp && !killedDown {
					break
				}
			}
			t.Logf("%d kill points", kills)
			if kills < 8 {
				t.Errorf("only %d kill points", kills)
			}
		})
	}
}

// wantPublished checks the mounts of a staged and published volume.
func (r *rig) wantPublished(readOnly, block bool) {
	r.t.Helper()
	r.kernel.mu.Lock()
	defer r.kernel.mu.Unlock()
	target := r.kernel.mounts[r.path("target")]
	staging := r.kernel.mounts[r.path("staging")]
	live := 0
	for _, d := range r.kernel.devices {
		if !d.dead {
			live++
		}
	}
	switch {
	case live != 1 || len(target) != 1:
		r.t.Fatalf("%d devices, mounts at target %+v", live, target)
	case block && (len(staging) != 0 || r.kernel.devices[target[0].device] == nil || r.kernel.devices[target[0].device].dead):
		r.t.Fatalf("block: staging %+v, target %+v", staging, target)
	case !block && (len(staging) != 1 || staging[0].Device != target[0].Device || target[0].ReadOnly != readOnly):
		r.t.Fatalf("filesystem: staging %+v, target %+v", staging, target)
	}
}

// TestFormatRules: mkfs runs where format.go says, and nowhere else.
func TestFormatRules(t *testing.T) {
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, r *rig) string // returns the volume
		cap     *csi.VolumeCapability
		formats int
		code    codes.Code
	}{
		{"new", func(t *testing.T, r *rig) string { return r.volume("v", nil) }, mountCap("xfs"), 1, codes.OK},
		{"new, type left open", func(t *testing.T, r *rig) string { return r.volume("v", nil) }, mountCap(""), 1, codes.OK},
		{"new, read-only", func(t *testing.T, r *rig) string { return r.volume("v", nil) },
			withMode(mountCap(""), csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY), 0, codes.FailedPrecondition},
		{"formatted", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, mountCap("ext4"))
			r.kernel.formats[id] = 0
			return id
		}, mountCap("ext4"), 0, codes.OK},
		{"formatted, another type asked for", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, mountCap("ext4"))
			r.kernel.formats[id] = 0
			return id
		}, mountCap("xfs"), 0, codes.FailedPrecondition},
		{"formatted, but it looks empty", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, mountCap("ext4"))
			r.kernel.formats[id] = 0
			r.kernel.content[id] = ""
			return id
		}, mountCap("ext4"), 0, codes.Internal},
		{"unreadable device", func(t *testing.T, r *rig) string {
			r.kernel.readEnds = errors.New("EIO")
			return r.volume("v", nil)
		}, mountCap("ext4"), 0, codes.Internal},
		{"written by somebody", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			writeTo(t, r, id)
			return id
		}, mountCap("ext4"), 0, codes.FailedPrecondition},
		{"allocated in advance", func(t *testing.T, r *rig) string {
			return r.create(&csi.CreateVolumeRequest{Name: "v", Parameters: map[string]string{"preallocation": "metadata"}})
		}, mountCap("ext4"), 1, codes.OK},
		{"allocated in advance, and written by somebody", func(t *testing.T, r *rig) string {
			id := r.create(&csi.CreateVolumeRequest{Name: "v", Parameters: map[string]string{"preallocation": "metadata"}})
			writeTo(t, r, id)
			return id
		}, mountCap("ext4"), 0, codes.FailedPrecondition},
		{"zeroes written by somebody are no data", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			d, err := r.pool.Open(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(d.Image.WriteZeroes(0, 1<<20, true), d.Close()); err != nil {
				t.Fatal(err)
			}
			return id
		}, mountCap("ext4"), 1, codes.OK},
		{"was a raw device", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, blockCap())
			return id
		}, mountCap("ext4"), 0, codes.Internal},
		{"was a raw device that was formatted by its user", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, blockCap())
			r.kernel.content[id] = "xfs"
			return id
		}, mountCap("xfs"), 0, codes.OK},
		{"clone of a formatted volume", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			mustCycle(t, r, id, mountCap("xfs"))
			clone := r.volume("c", fromVolume(id))
			r.kernel.content[clone] = "xfs"
			return clone
		}, mountCap(""), 0, codes.OK},
		{"clone of a volume without a filesystem", func(t *testing.T, r *rig) string {
			return r.volume("c", fromVolume(r.volume("v", nil)))
		}, mountCap("ext4"), 0, codes.FailedPrecondition},
		{"mkfs was interrupted", func(t *testing.T, r *rig) string {
			id := r.volume("v", nil)
			writeTo(t, r, id)
			if err := r.pool.SetFilesystem(id, volume.Filesystem{State: volume.FilesystemFormatting, Type: "xfs"}); err != nil {
				t.Fatal(err)
			}
			return id
		}, mountCap("ext4"), 1, codes.OK},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			id := c.prepare(t, r)
			wantCode(t, "stage", r.stage(id, c.cap), c.code)
			if got := r.kernel.formats[id]; got != c.formats {
				t.Errorf("formatted %d times, want %d", got, c.formats)
			}
			if c.code != codes.OK {
				r.wantClean() // a final code promises it
			}
			if err := r.unstage(id); err != nil {
				t.Error(err)
			}
			r.wantClean()
		})
	}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

// mustCycle stages and unstages.
func mustCycle(t *testing.T, r *rig, id string, c *csi.VolumeCapability) {
	t.Helper()
	if err := r.stage(id, c); err != nil {
		t.Fatal(err)
	}
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
}

func writeTo(t *testing.T, r *rig, id string) {
	t.Helper()
	d, err := r.pool.Open(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.Image.WriteAt([]byte("data"), 12345)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestPublishTargets: what the access modes allow beside a first target.
func TestPublishTargets(t *testing.T) {
	modes := csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	for _, c := range []struct {
		mode csi.VolumeCapability_AccessMode_Mode
		want codes.Code
	}{
		{modes, codes.FailedPrecondition},
		{csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER, codes.FailedPrecondition},
		{csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER, codes.OK},
	} {
		r := newRig(t)
		id := r.volume("v", nil)
		if err := errors.Join(r.stage(id, withMode(mountCap(""), c.mode)), r.publish(id, withMode(mountCap(""), c.mode))); err != nil {
			t.Fatal(err)
		}
		wantCode(t, "same target", r.publish(id, withMode(mountCap(""), c.mode)), codes.OK)
		again := r.publishRequest(id, withMode(mountCap(""), c.mode))
		again.Readonly = true
		_, err := r.NodePublishVolume(t.Context(), again)
		wantCode(t, "same target, other arguments", err, codes.AlreadyExists)
		second := r.publishRequest(id, withMode(mountCap(""), c.mode))
		second.TargetPath = r.path("second")
		_, err = r.NodePublishVolume(t.Context(), second)
		wantCode(t, c.mode.String()+": second target", err, c.want)
		wantCode(t, "unstage while published", r.unstage(id), codes.FailedPrecondition)
		_, err = r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
		wantCode(t, "delete while published", err, codes.FailedPrecondition)
		if c.want == codes.OK {
			if _, err := r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: r.path("second")}); err != nil {
				t.Error(err)
			}
		}
		if err := errors.Join(r.unpublish(id), r.unstage(id)); err != nil {
			t.Error(err)
		}
		r.wantClean()
	}
}

// TestForeignMountsAreLeftAlone: no RPC takes away or covers a mount that is not the volume's.
func TestForeignMountsAreLeftAlone(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	foreign := []fakeMount{{Mount: Mount{Device: 999, Type: "nfs"}}}
	r.kernel.mounts[r.path("staging")] = foreign
	wantCode(t, "stage", r.stage(id, mountCap("")), codes.FailedPrecondition)
	if len(r.kernel.mounts[r.path("staging")]) != 1 {
		t.Error("the foreign mount is gone")
	}
	delete(r.kernel.mounts, r.path("staging"))
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	r.kernel.mounts[r.path("target")] = foreign
	wantCode(t, "publish", r.publish(id, mountCap("")), codes.FailedPrecondition)
	wantCode(t, "unpublish of an unknown volume", func() error {
		_, err := r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "unknown", TargetPath: r.path("target")})
		return err
	}(), codes.NotFound)
	if len(r.kernel.mounts[r.path("target")]) != 1 {
		t.Error("the foreign mount is gone")
	}
	delete(r.kernel.mounts, r.path("target"))
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
	r.wantClean()
}

// TestBusyDevice: a device that somebody holds is not given up; a retry is.
func TestBusyDevice(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	r.hold(true)
	wantCode(t, "unstage", r.unstage(id), codes.Aborted)
	_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	wantCode(t, "delete", err, codes.FailedPrecondition)
	r.hold(false)
	wantCode(t, "unstage again", r.unstage(id), codes.OK)
	r.wantClean()
}

func (r *rig) hold(held bool) {
	r.kernel.mu.Lock()
	defer r.kernel.mu.Unlock()
	for _, d := range r.kernel.devices {
		d.held = held
	}
}

func TestNodeLimit(t *testing.T) {
	r := newRig(t)
	for i := range 6 {
		id := r.volume(fmt.Sprint(i), nil)
		req := r.stageRequest(id, mountCap(""))
		req.StagingTargetPath += fmt.Sprint(i)
		_, err := r.NodeStageVolume(t.Context(), req)
		want := codes.OK
		if i == 5 {
			want = codes.ResourceExhausted
		}
		wantCode(t, fmt.Sprint("stage ", i), err, want)
	}
}

// TestHintsThatDoNotCount: a hint of another boot, or a damaged one, is dropped;
// the volume is staged as if nothing had been.
func TestHintsThatDoNotCount(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	path := filepath.Join(r.dir, "run", hintName(id))
	other, err := durable.EncodeRecord(hintKind, hintVersion, stageHint{Volume: id, BootID: "another boot", StagingPath: r.path("staging"), Device: "/dev/fake9"})
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := durable.EncodeRecord(hintKind, hintVersion, stageHint{Volume: "vol-x"})
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string][]byte{"another boot": other, "damaged": []byte("{"), "another volume": foreign} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		r.restart()
		if r.driver.stagedVolume(id) != nil {
			t.Errorf("%s: the volume counts as staged", what)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the hint is left: %v", what, err)
		}
	}
	mustCycle(t, r, id, mountCap(""))
	r.wantClean()
}

// TestPathsWithASlashBehind: they name what they name without it, in every call.
func TestPathsWithASlashBehind(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	for i := range 2 { // the second time there is nothing to do
		stage := r.stageRequest(id, mountCap(""))
		stage.StagingTargetPath += "/"
		if _, err := r.NodeStageVolume(t.Context(), stage); err != nil {
			t.Fatalf("stage %d: %v", i, err)
		}
	}
	if err := r.publish(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	publish := r.publishRequest(id, mountCap(""))
	publish.TargetPath += "/"
	if _, err := r.NodePublishVolume(t.Context(), publish); err != nil {
		t.Fatal(err)
	}
	if _, err := r.NodeGetVolumeStats(t.Context(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: publish.TargetPath}); err != nil {
		t.Error(err)
	}
	if _, err := r.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: publish.TargetPath}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.NodeUnstageVolume(t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: r.path("staging") + "/"}); err != nil {
		t.Fatal(err)
	}
	r.wantClean()
}

// TestReadOnlyMountDoesNotGrow: a volume that is larger than its filesystem, and whose
// mount options say "ro", is staged and expanded all the same.
func TestReadOnlyMountDoesNotGrow(t *testing.T) {
	for _, grows := range []bool{true, false} {
		r := newRig(t)
		r.kernel.grows = grows
		id := r.volume("v", nil)
		if err := r.stage(id, mountCap("ext4", "rw", "ro")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.ControllerExpandVolume(t.Context(), &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 8 << 20}}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.NodeExpandVolume(t.Context(), &csi.NodeExpandVolumeRequest{VolumeId: id, VolumePath: r.path("staging")}); err != nil {
			t.Error(err)
		}
		if err := r.unstage(id); err != nil {
			t.Fatal(err)
		}
	}
}
