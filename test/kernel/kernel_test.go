//go:build kernel

package kernel

import (
	"context"
	"flag"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"csi-qcow2/test/kernel/vm"
)

// kernelCache is kept between runs, and ignored by git.
const kernelCache = "../../.cache/kernel"

// runTimeout is for a machine that hangs, or that has to share its processors.
func runTimeout() time.Duration { return 18*time.Minute + time.Duration(*kills)*time.Minute }

// environment is what the programs in the machine need.
var environment = vm.Environment{
	Modules: []string{"nbd", "xfs", "ext4", "loop", "fuse", "nfsd", "nfsv4"},
	Programs: []string{"mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "xfs_growfs", "xfs_io", "xfs_spaceman",
		"fio", "blkdiscard", "fstrim", "mount", "umount", "losetup", "blkid", "nbd-client", "dash"},
}

// prepare returns a context for one run of a machine, and the machine.
func prepare(t *testing.T) (context.Context, *vm.Machine) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout())
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

// TestKernel runs the tests of package guest with the kernel's nbd driver, but for those of the node process.
func TestKernel(t *testing.T) {
	runGuest(t, vm.Job{Args: []string{"-test.skip=^TestRestart"}})
}

// kills is how often TestRestart kills; 0 leaves it to the test.
var kills = flag.Int("kills", 0, "how often TestRestart kills the node process")

// only picks tests of package guest.
var only = flag.String("only", "", "a regexp of the tests of package guest that TestRestart runs")

// TestRestart runs the tests of package guest that kill, stop and start the node process. With -kills it
// only kills, so often.
func TestRestart(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "csi-qcow2")
	build(t, binary, "build", "csi-qcow2/cmd/csi-qcow2")
	job := vm.Job{Args: []string{"-test.run=^TestRestart"}, Files: map[string]string{"/csi-qcow2": binary}}
	if *kills > 0 {
		job.Args = []string{"-test.run=^TestRestartKilled$"}
		job.Env = []string{fmt.Sprintf("GUEST_KILLS=%d", *kills)}
	}
	if *only != "" {
		job.Args = []string{"-test.run=" + *only}
	}
	runGuest(t, job)
}

// build runs a command of go that makes the static program file.
func build(t *testing.T, file string, command ...string) {
	t.Helper()
	args := append(command[:len(command)-1:len(command)-1], "-buildvcs=false", "-o", file, command[len(command)-1])
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
}

// runGuest runs tests of package guest in a machine.
func runGuest(t *testing.T, job vm.Job) {
	t.Helper()
	ctx, machine := prepare(t)
	job.Program = filepath.Join(t.TempDir(), "guest.test")
	build(t, job.Program, "test", "-c", "-tags", "kernelguest", "csi-qcow2/test/kernel/guest")
	job.Args = append(job.Args, "-test.v", "-test.timeout="+runTimeout().String())
	job.Log = logger(t)
	begin := time.Now()
	result, err := machine.Run(ctx, job)
	if err != nil {
		t.Error(err)
	}
	if !result.Passed {
		t.Error("the tests in the machine have failed, see above")
	}
	result.Kernel = withoutExpected(result.Kernel)
	for _, line := range result.Trouble(nil) {
		t.Errorf("the kernel printed: %s", line)
	}
	t.Logf("the machine ran for %.1f s", time.Since(begin).Seconds())
}

// withoutExpected drops the lines of the kernel between marks of tests that make trouble on purpose.
func withoutExpected(lines []string) []string {
	expected := false
	return slices.DeleteFunc(slices.Clone(lines), func(line string) bool {
		switch {
		case strings.HasSuffix(line, "guest: trouble is expected from here"):
			expected = true
		case strings.HasSuffix(line, "guest: trouble is expected up to here"):
			expected = false
		}
		return expected
	})
}
