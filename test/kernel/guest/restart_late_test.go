//go:build kernelguest

package guest

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// expectTrouble tells who reads the kernel's log that errors are meant, until the end of the test.
func expectTrouble(t *testing.T) {
	t.Helper()
	mark := func(text string) {
		if err := os.WriteFile("/dev/kmsg", []byte(text), 0); err != nil {
			t.Error(err)
		}
	}
	mark("guest: trouble is expected from here")
	t.Cleanup(func() { mark("guest: trouble is expected up to here") })
}

// TestRestartTooLate restarts the process after the kernel has given up waiting. The filesystem must have seen
// the error, the volume must be called lost, and a new stage must find all that was synced.
func TestRestartTooLate(t *testing.T) {
	expectTrouble(t)
	a := newAgent(t, "--dead-connection-timeout", "1s")
	v := a.create("late", "ext4", 64<<20, "")
	v.mount()
	synced := bytes.Repeat([]byte("synced. "), 64<<10)
	write(t, filepath.Join(v.target(), "synced"), synced)
	a.kill()
	// The write waits for a server, and fails when the kernel has waited long enough.
	out, err := exec.Command("dd", "if=/dev/zero", "of="+filepath.Join(v.target(), "late"), "bs=64k", "count=4", "conv=fsync").CombinedOutput()
	if err == nil {
		t.Errorf("a write without a server succeeded:\n%s", out)
	}
	a.start()
	wait(t, "the health to tell of the loss", func() bool { return slices.Contains(v.health(), "DeviceLost") })
	v.mount() // kubelet's way to repair
	if got, err := os.ReadFile(filepath.Join(v.target(), "synced")); err != nil || !bytes.Equal(got, synced) {
		t.Errorf("what was synced before: %d bytes, %v", len(got), err)
	}
	if reasons := v.health(); len(reasons) > 0 {
		t.Errorf("health after the repair: %q", reasons)
	}
	write(t, filepath.Join(v.target(), "again"), synced)
	v.unmount()
	v.checkAndDelete()
}

// TestRestartWithoutCache removes the arena of a killed process, and with it what was acknowledged and not
// flushed. The device must not be served as if nothing had happened.
func TestRestartWithoutCache(t *testing.T) {
	expectTrouble(t)
	a := newAgent(t, "--dead-connection-timeout", "2s")
	v := a.create("forgotten", "ext4", 64<<20, "")
	v.mount()
	synced := bytes.Repeat([]byte("synced. "), 64<<10)
	write(t, filepath.Join(v.target(), "synced"), synced)
	a.kill()
	if err := os.Remove(filepath.Join(runDir, "arena")); err != nil {
		t.Fatal(err)
	}
	a.start()
	wait(t, "the health to tell of the loss", func() bool { return slices.Contains(v.health(), "DeviceLost") })
	v.mount()
	if got, err := os.ReadFile(filepath.Join(v.target(), "synced")); err != nil || !bytes.Equal(got, synced) {
		t.Errorf("what was synced before: %d bytes, %v", len(got), err)
	}
	wait(t, "the old device to go", func() bool {
		left, _ := filepath.Glob("/sys/block/nbd*/backend")
		return len(left) == 1
	})
	v.unmount()
	v.checkAndDelete()
}

// write writes a file and syncs it.
func write(t *testing.T, path string, content []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}
