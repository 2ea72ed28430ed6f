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
	pressureVolume = 128 << 20
	pressureSpare  = 96 << 20 // memory that is left to everybody
	pressureNode   = 96 << 20 // memory of the node process
)

// TestRestartUnderPressure writes far more than there is memory, with pages that may be dirty up to 95 percent, the
// process in a small control group, and kills it meanwhile. The kernel can get memory only by writing to the
// device, and the process must not wait for that.
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

	a := newAgent(t)
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
	// The pool is memory here: it is all there before the process is confined.
	v := a.createWith(&volume{a: a, name: "pressed", fs: "ext4", bytes: pressureVolume, params: map[string]string{"preallocation": "full"}}, "")
	v.mount()
	confine := func() { set(t, group+"/cgroup.procs", strconv.Itoa(a.cmd.Process.Pid)) }
	confine()
	release := hog(t)
	for n := range 2 {
		done := make(chan error, 1)
		go func() { // ends with fio
			out, err := exec.Command("fio", "--name=pressure", "--thread", "--directory="+v.target(), "--numjobs=1", "--size=96m", "--rw=write", "--bs=64k", "--ioengine=psync",
				"--end_fsync=1", "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", fmt.Sprintf("--randseed=%d", n), "--minimal").CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w\n%s", err, out)
			}
			done <- err
		}()
		wait(t, "dirty pages", func() bool { return memory(t, "Dirty")+memory(t, "Writeback") > 16<<20 })
		a.kill()
		a.start()
		confine()
		if err := <-done; err != nil {
			t.Errorf("writing under pressure: %v", err)
		}
		t.Logf("round %d: %d MiB of memory are available", n+1, memory(t, "MemAvailable")>>20)
	}
	release()
	v.unmount()
	v.checkAndDelete()
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
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == field+":" {
			n, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("no %s in /proc/meminfo", field)
	return 0
}

// set writes a file of the kernel.
func set(t *testing.T, path, value string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		t.Errorf("%s to %s: %v", value, path, err)
	}
}
