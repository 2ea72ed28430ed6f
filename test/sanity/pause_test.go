package sanity

import (
	"bytes"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// TestUpgradeWhileWritesWait replaces the process while writes wait for space in the
// pool: the next one has them, and the first that finds space makes them.
func TestUpgradeWhileWritesWait(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("v", "")
	upgrade := func(args ...string) {
		t.Helper()
		if err := p.signal(syscall.SIGTERM); err != nil {
			t.Fatalf("SIGTERM: %v", err)
		}
		p.args = args
		p.start()
	}
	full := []string{"--pool-stop", "0.0001", "--pool-pause", "24h"}
	upgrade(full...)

	content := bytes.Repeat([]byte("qcow2"), 1<<20)
	writeFile(t, p.path("content"), content)
	written := make(chan error, 1)
	go func() { // ends with the device at the latest
		out, err := exec.Command("dd", "if="+p.path("content"), "of="+k.target("v"), "bs=1M", "oflag=direct", "conv=notrunc").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("dd: %w\n%s", err, out)
		}
		written <- err
	}()
	ended := succeeded(t, written)
	for _, args := range [][]string{full, full, nil} {
		p.wait("writes to wait", func() bool {
			if ended() {
				t.Fatal("a write to a full pool has succeeded")
			}
			return slices.ContainsFunc(k.health(id), func(h string) bool { return strings.Contains(h, "WritesPaused") })
		})
		upgrade(args...)
	}
	p.wait("the writes", ended)
	wantDevice(t, k.target("v"), content)
	k.dispose("v", id)
	k.finish()
}
