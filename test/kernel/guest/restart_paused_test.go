//go:build kernelguest

package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// TestRestartPaused ends the process, as an upgrade does, while a write waits for space: the kernel sends
// it to the next one again, until one makes it.
func TestRestartPaused(t *testing.T) {
	a := newAgent(t)
	v := a.create("paused", "", 64<<20, "")
	v.mount()
	upgrade := func(flags ...string) {
		a.terminate()
		a.flags = flags
		a.start()
	}
	full := []string{"--pool-stop", "0.0001", "--pool-pause", "24h"}
	upgrade(full...)
	w := &workers{t: t}
	defer w.stop()
	w.start("write", func(context.Context) error { // ends with the write
		if out, err := exec.Command("xfs_io", "-d", "-c", "pwrite -S 7 -b 1m 0 1m", v.target()).CombinedOutput(); err != nil {
			return fmt.Errorf("xfs_io: %w\n%s", err, out)
		}
		return nil
	})
	for _, flags := range [][]string{full, nil} {
		wait(t, "the write to wait", func() bool { return slices.Contains(v.health(), "WritesPaused") })
		upgrade(flags...)
	}
	w.stop()
	f, err := os.Open(v.target())
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 1<<20)
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, 1<<20)) {
		t.Errorf("%v, or other bytes than were written", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	v.unmount()
	a.call("DeleteVolume "+v.name, v.deleteOnce)
}
