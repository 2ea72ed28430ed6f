//go:build kernel

package kernel

import (
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"csi-qcow2/test/kernel/vm"
)

const (
	// runTimeout is for a machine that hangs, or that has to share its processors.
	runTimeout = 12 * time.Minute

	// kernelCache is kept between runs, and ignored by git.
	kernelCache = "../../.cache/kernel"
)

// allowed are lines of the kernel's that one test or another provokes on purpose: nbd's own, about sockets that
// go. None of them reaches a filesystem.
var allowed = regexp.MustCompile(`block nbd\d+: |^\[ *[\d.]+\] nbd\d+: detected capacity change`)

// TestKernel runs the tests of package guest with the kernel's nbd driver.
func TestKernel(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	dir, err := filepath.Abs(kernelCache)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	machine, err := vm.Prepare(ctx, dir, vm.Environment{
		Modules: []string{"nbd", "xfs", "ext4", "loop", "fuse"},
		Programs: []string{"mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "xfs_growfs", "xfs_io", "xfs_spaceman",
			"fio", "blkdiscard", "fstrim", "mount", "umount", "losetup", "blkid"},
	})
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "guest.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-tags", "kernelguest", "-o", program, "csi-qcow2/test/kernel/guest")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	t.Logf("kernel %s; prepared in %.1f s", machine.Kernel.Release, time.Since(begin).Seconds())

	begin = time.Now()
	var mu sync.Mutex // two lines come at once
	result, err := machine.Run(ctx, vm.Job{
		Program: program,
		Args:    []string{"-test.v", "-test.timeout=" + runTimeout.String()},
		Log: func(line string) {
			mu.Lock()
			defer mu.Unlock()
			t.Log(line)
		},
	})
	if err != nil {
		t.Error(err)
	}
	if !result.Passed {
		t.Error("the tests in the machine have failed, see above")
	}
	for _, line := range result.Trouble(allowed) {
		t.Errorf("the kernel printed: %s", line)
	}
	t.Logf("the machine ran for %.1f s", time.Since(begin).Seconds())
}
