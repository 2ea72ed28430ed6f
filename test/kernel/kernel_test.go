//go:build kernel

package kernel

import (
	"context"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
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

// environment is what the programs in the machine need.
var environment = vm.Environment{
	Modules: []string{"nbd", "xfs", "ext4", "loop", "fuse"},
	Programs: []string{"mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "xfs_growfs", "xfs_io", "xfs_spaceman",
		"fio", "blkdiscard", "fstrim", "mount", "umount", "losetup", "blkid", "nbd-client", "dash"},
}

// prepare returns a context for one run of a machine, and the machine.
func prepare(t *testing.T) (context.Context, *vm.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	t.Cleanup(cancel)
	dir, err := filepath.Abs(kernelCache)
	if err != nil {
		t.Fatal(err)
	}
	machine, err := vm.Prepare(ctx, dir, environment)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s", machine.Kernel.Release)
	return ctx, machine
}

// logger returns a function that logs lines as they come: those of the kernel and of the program at once.
func logger(t *testing.T) func(string) {
	var mu sync.Mutex
	return func(line string) {
		mu.Lock()
		defer mu.Unlock()
		t.Log(line)
	}
}

// TestMachineSeesFailure checks that a program that fails, and a kernel in trouble, do not pass.
func TestMachineSeesFailure(t *testing.T) {
	ctx, machine := prepare(t)
	result, err := machine.Run(ctx, vm.Job{
		Program: "/bin/dash",
		Args:    []string{"-c", "echo $WORD; cat /given; echo 'BUG: not really' >/dev/kmsg; exit 3"},
		Env:     []string{"WORD=it's here"},
		Files:   map[string]string{"/given": "doc.go"},
		Log:     logger(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	if result.Passed {
		t.Error("exit status 3 has passed")
	}
	for _, want := range []string{"it's here", "package kernel", "GUEST FAIL: exit status 3"} {
		if !slices.Contains(result.Output, want) {
			t.Errorf("the program's output lacks %q", want)
		}
	}
	if trouble := result.Trouble(nil); len(trouble) != 1 || !strings.Contains(trouble[0], "not really") {
		t.Errorf("trouble: %q, want one line", trouble)
	}
}

// TestKernel runs the tests of package guest with the kernel's nbd driver.
func TestKernel(t *testing.T) {
	ctx, machine := prepare(t)
	program := filepath.Join(t.TempDir(), "guest.test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-tags", "kernelguest", "-o", program, "csi-qcow2/test/kernel/guest")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	begin := time.Now()
	result, err := machine.Run(ctx, vm.Job{
		Program: program,
		Args:    []string{"-test.v", "-test.timeout=" + runTimeout.String()},
		Log:     logger(t),
	})
	if err != nil {
		t.Error(err)
	}
	if !result.Passed {
		t.Error("the tests in the machine have failed, see above")
	}
	for _, line := range result.Trouble(nil) {
		t.Errorf("the kernel printed: %s", line)
	}
	t.Logf("the machine ran for %.1f s", time.Since(begin).Seconds())
}
