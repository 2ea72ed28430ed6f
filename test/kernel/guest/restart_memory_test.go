//go:build kernelguest

package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// Sizes of TestRestartUnderPressure, in bytes.
const (
	pressureVolume = 192 << 20
	pressureSpare  = 64 << 20  // memory that is left to everybody
	pressureNode   = 96 << 20  // memory of the node process and the programs that it starts
	pressureMuch   = 128 << 20 // more than all pages that can be dirty
	pressureSome   = 40 << 20  // that can be dirty while a process starts
)

// TestRestartUnderPressure writes far more than there is memory, with pages that may be dirty up to 95 percent, the
// process in a small control group: the kernel can get memory only by writing to the device, and the process
// must not wait for that. Then it kills the process while pages are dirty that nobody can write back.
func TestRestartUnderPressure(t *testing.T) {
	for name, value := range map[string]string{"dirty_ratio": "95", "dirty_background_ratio": "90"} {
		path := "/proc/sys/vm/" + name
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		set(t, path, value)
		t.Cleanup(func() { set(t, path, strings.TrimSpace(string(before))) })
	}
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/sys/fs/cgroup", unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	set(t, "/sys/fs/cgroup/cgroup.subtree_control", "+memory")
	group := "/sys/fs/cgroup/node"
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	set(t, group+"/memory.max", strconv.Itoa(pressureNode))
	groupFile, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer groupFile.Close()

	// The pool is memory here, and is all there before the process is confined.
	a := newAgent(t)
	v := a.createWith(&volume{a: a, name: "pressed", fs: "ext4", bytes: pressureVolume, params: map[string]string{"preallocation": "full"}}, "")
	a.terminate()
	a.group = int(groupFile.Fd())
	a.start()
	var notes []string
	a.call("NodeGetStorageHealth", func(ctx context.Context) error {
		resp, err := a.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
		notes = nil
		for _, h := range resp.GetBackendHealth() {
			if h.GetReason() == "ProcessUnprotected" {
				notes = append(notes, h.GetMessage())
			}
		}
		return err
	})
	if len(notes) > 0 {
		t.Errorf("the process is not protected: %q", notes)
	}
	v.mount()
	release := hog(t)
	reclaimed := counter(t, "/proc/vmstat", "pgscan_kswapd") + counter(t, "/proc/vmstat", "pgscan_direct")
	if err := <-press(v, "much", pressureMuch); err != nil {
		t.Errorf("writing more than there is memory: %v", err)
	}
	reclaimed = counter(t, "/proc/vmstat", "pgscan_kswapd") + counter(t, "/proc/vmstat", "pgscan_direct") - reclaimed
	t.Logf("%d pages were looked at for memory; the process and its programs had at most %d MiB", reclaimed, counter(t, group+"/memory.peak", "")>>20)
	if reclaimed == 0 {
		t.Error("memory was not short: nothing is tested")
	}
	if err := os.Remove(filepath.Join(v.target(), "much")); err != nil {
		t.Error(err)
	}

	done := press(v, "some", pressureSome)
	wait(t, "dirty pages", func() bool { return memory(t, "Dirty")+memory(t, "Writeback") > pressureSome/4 })
	a.kill()
	a.start()
	if err := <-done; err != nil {
		t.Errorf("writing under pressure: %v", err)
	}
	release()
	v.unmount()
	v.checkAndDelete()
	if n := counter(t, "/proc/vmstat", "oom_kill"); n > 0 {
		t.Errorf("the kernel has killed %d processes for want of memory", n)
	}
}

// press writes a file and verifies it, and tells when that is done.
func press(v *volume, name string, bytes int) <-chan error {
	done := make(chan error, 1)
	go func() { // ends with fio
		out, err := exec.Command("fio", "--name=pressure", "--thread", "--filename="+filepath.Join(v.target(), name), "--numjobs=1", "--size="+strconv.Itoa(bytes),
			"--rw=write", "--bs=64k", "--ioengine=psync", "--end_fsync=1", "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--minimal").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, out)
		}
		done <- err
	}()
	return done
}

// hog takes memory until pressureSpare is left.
func hog(t *testing.T) (release func()) {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("hog", dir, "tmpfs", 0, "size=100%"); err != nil {
		t.Fatal(err)
	}
	release = sync.OnceFunc(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(release)
	f, err := os.Create(filepath.Join(dir, "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n := memory(t, "MemAvailable") - pressureSpare; n > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, n); err != nil {
			t.Fatalf("take %d bytes of memory: %v", n, err)
		}
	}
	return release
}

// memory returns a field of /proc/meminfo in bytes.
func memory(t *testing.T, field string) int64 {
	t.Helper()
	return counter(t, "/proc/meminfo", field+":") << 10
}

// counter returns the number behind a field in a file of the kernel; the first one for the field "".
func counter(t *testing.T, path, field string) int64 {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if field != "" && (len(fields) < 2 || fields[0] != field) {
			continue
		}
		if field != "" {
			fields = fields[1:]
		}
		n, err := strconv.ParseInt(fields[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	t.Fatalf("no %s in %s", field, path)
	return 0
}

// set writes a file of the kernel.
func set(t *testing.T, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Errorf("%s to %s: %v", value, path, err)
	}
}
