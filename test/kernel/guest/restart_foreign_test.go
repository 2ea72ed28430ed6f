//go:build kernelguest

package guest

import (
	"path/filepath"
	"slices"
	"testing"

	"csi-qcow2/nbdexport"
)

// TestRestartForeign disconnects the device of a killed process, and gives its place to somebody else, who has it
// mounted and writes to it. The next process leaves that alone, says that its own is lost, and repairs it elsewhere.
func TestRestartForeign(t *testing.T) {
	a := newAgent(t)
	v := a.create("displaced", "", 16<<20, "")
	a.call("NodeStageVolume", v.stageOnce)
	device := v.device()
	a.kill()
	run(t, "nbd-client", "-d", device)

	theirs, err := nbdexport.NewAttacher(nbdexport.KindNBD, nbdexport.AttacherOptions{RunDir: filepath.Join(t.TempDir(), "run")})
	if err != nil {
		t.Fatal(err)
	}
	foreign := attach(t, theirs, newDisk(t, "raw", 64<<20), nbdexport.DeviceOptions{ID: v.id + ".1", Discard: true})
	if foreign.Path() != device {
		t.Fatalf("the other device is %s, not %s: nothing is tested", foreign.Path(), device)
	}
	backend := attribute(t, foreign, "backend")
	run(t, "mkfs.ext4", "-q", device)
	dir := t.TempDir()
	run(t, "mount", device, dir)
	stop := keepWriting(t, filepath.Join(dir, "busy"))

	a.start()
	wait(t, "the health to tell of the loss", func() bool { return slices.Contains(v.health(), "DeviceLost") })
	a.call("NodeStageVolume", v.stageOnce)
	if reasons := v.health(); len(reasons) > 0 {
		t.Errorf("health after the repair: %q", reasons)
	}
	a.call("NodeUnstageVolume", v.unstageOnce)
	a.call("DeleteVolume", v.deleteOnce)
	stop()
	if err := foreign.Health(); err != nil {
		t.Errorf("health of the other device: %v", err)
	}
	if got := attribute(t, foreign, "backend"); got != backend {
		t.Errorf("the other device has the backend %q, had %q", got, backend)
	}
	run(t, "umount", dir)
	run(t, "e2fsck", "-fn", device)
	if err := foreign.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}
