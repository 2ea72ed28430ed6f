//go:build kernelguest

package guest

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestRestartOnNFS kills the process over a pool on NFS in the middle of calls and under load, replaces the NFS
// server, and removes what somebody has open: NFS keeps that under another name.
func TestRestartOnNFS(t *testing.T) {
	server, pool := mountNFS(t)
	a := newAgentOn(t, pool)
	plain := a.create("plain", "ext4", 128<<20, "")
	plain.mount()
	content := make([]byte, 8<<20)
	rand.NewChaCha8([32]byte{}).Read(content)
	write(t, filepath.Join(plain.target(), "content"), content)
	restored := a.create("restored", "ext4", 128<<20, plain.snapshot("base"))
	restored.mount()
	if got, err := os.ReadFile(filepath.Join(restored.target(), "content")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("of the snapshot: %d bytes, %v", len(got), err)
	}

	// The server shares the blocks of files, if it can.
	shared := a.createWith(&volume{a: a, name: "shared", fs: "ext4", bytes: 128 << 20, params: map[string]string{"cloneMode": "reflink"}}, plain.snapshot("shared"))
	shared.mount()
	if got, err := os.ReadFile(filepath.Join(shared.target(), "content")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("of the shared blocks: %d bytes, %v", len(got), err)
	}
	shared.unmount()
	shared.checkAndDelete()

	all := []*volume{plain, restored}
	w := &workers{t: t}
	defer w.stop()
	pulses := w.loadAll(all)
	beaten := func() {
		t.Helper()
		for _, one := range pulses {
			one.beaten(a)
		}
	}
	for _, s := range strikesOf(a, plain, restored)[1:4] { // snapshot, delete snapshot, expand
		finish := s.begin()
		beaten()
		a.kill()
		a.start()
		a.restored(all)
		finish()
		beaten()
	}
	image := filepath.Join(pool, "volumes", plain.id, "disk.qcow2")
	if out, err := exec.Command(binary, "img", "resize", image, "1G").CombinedOutput(); err == nil || !strings.Contains(string(out), `"write" lock`) {
		t.Errorf("a second writer is not locked out: %v\n%s", err, out)
	}
	server.stop()
	server.start()
	beaten()
	server.endGrace()
	a.restored(all)
	w.stop()

	// What the filesystem drops is punched on the server.
	gone := filepath.Join(plain.target(), "gone")
	write(t, gone, content)
	full := server.allocated(plain)
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	wait(t, "the server to get space back", func() bool {
		run(t, "fstrim", plain.target())
		run(t, "sync", "-f", plain.target())
		return server.allocated(plain) <= full-int64(len(content))*3/4
	})

	// An image that somebody reads is deleted, and its volume is made again.
	restored.unmount()
	reader, err := os.Open(filepath.Join(pool, "volumes", restored.id, "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	restored.checkAndDelete()
	if names, _ := filepath.Glob(filepath.Join(pool, "incoming", restored.id, ".nfs*")); len(names) != 1 {
		t.Errorf("an open file that was removed has the names %q, want 1", names)
	}
	again := a.create("restored", "ext4", 128<<20, "")
	again.mount()
	again.unmount()
	again.checkAndDelete()
	// A machine that dies leaves such names.
	orphan := filepath.Join(pool, "volumes", plain.id, "snapshots", ".nfs000000000000000a00000001")
	if err := os.WriteFile(orphan, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.kill()
	a.start()
	a.restored([]*volume{plain})
	if _, err := os.Lstat(orphan); !os.IsNotExist(err) {
		t.Errorf("the orphan of an open file: %v, want none", err)
	}
	if got, err := os.ReadFile(filepath.Join(plain.target(), "content")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("at the end: %d bytes, %v", len(got), err)
	}
	plain.unmount()
	plain.checkAndDelete()
}
