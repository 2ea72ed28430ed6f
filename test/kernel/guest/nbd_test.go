//go:build kernelguest

package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// rounds is how often a device lives its life, heavyRounds in how many of them, the first, it works
// hard: one for each filesystem on each format.
const rounds, heavyRounds = 20, 4

// run runs a program and returns what it prints.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func newAttacher(t *testing.T) *nbdexport.Attacher {
	t.Helper()
	a, err := nbdexport.NewAttacher(nbdexport.KindAuto, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	if a.Kind() != nbdexport.KindNBD {
		t.Fatalf("auto chose %s on a kernel with nbd", a.Kind())
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob("/sys/block/nbd*/pid"); len(left) > 0 {
			t.Errorf("devices left: %v", left)
		}
	})
	return a
}

// attach attaches d; the device is detached at the end of the test if the test has not done so.
func attach(t *testing.T, a *nbdexport.Attacher, d nbdexport.Backend, o nbdexport.DeviceOptions) nbdexport.Device {
	t.Helper()
	dev, err := a.Attach(t.Context(), d, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Detach(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return dev
}

// attribute reads an attribute of a device from sysfs.
func attribute(t *testing.T, dev nbdexport.Device, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(dev.Path()), name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// TestLife attaches a disk, and makes, uses, trims and grows a filesystem on it, over and over.
func TestLife(t *testing.T) {
	const size, grown = 384 << 20, 512 << 20
	a := newAttacher(t)
	for i := range rounds {
		format := []string{"qcow2", "raw"}[i/2%2]
		fstype := []string{"ext4", "xfs"}[i%2]
		blockSize := []int{512, 4096}[i/4%2]
		t.Run(fmt.Sprintf("%d/%s/%s/%d", i, format, fstype, blockSize), func(t *testing.T) {
			d := newDisk(t, format, size)
			dev := attach(t, a, d, nbdexport.DeviceOptions{ID: fmt.Sprintf("vol-%d.g1", i), BlockSize: blockSize, Discard: true})
			if got, want := attribute(t, dev, "queue/logical_block_size"), fmt.Sprint(blockSize); got != want {
				t.Errorf("logical block size %s, want %s", got, want)
			}
			run(t, "mkfs."+fstype, "-q", dev.Path())
			dir := t.TempDir()
			run(t, "mount", "-t", fstype, dev.Path(), dir)
			jobs, mib := 2, 8
			if i >= heavyRounds {
				jobs, mib = 1, 2
			}
			run(t, "fio", "--name=verify", "--thread", "--directory="+dir, fmt.Sprintf("--numjobs=%d", jobs), fmt.Sprintf("--size=%dm", mib),
				"--rw=randrw", "--bsrange=4k-128k", "--ioengine=psync", "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--fsync=32",
				fmt.Sprintf("--randseed=%d", i), "--minimal")
			for job := range jobs {
				if err := os.Remove(filepath.Join(dir, fmt.Sprintf("verify.%d.0", job))); err != nil {
					t.Fatal(err)
				}
			}
			unix.Sync()
			run(t, "fstrim", dir)
			if raw, ok := d.(*nbdtest.FileBackend); ok {
				if got, want := raw.Trimmed.Load(), int64(jobs*mib)<<20; got < want {
					t.Errorf("%d bytes were discarded, want at least %d", got, want)
				}
				if raw.Flushes.Load() == 0 {
					t.Error("no flush has reached the backend")
				}
			}
			stop := keepWriting(t, filepath.Join(dir, "busy"))
			if err := d.Grow(grown); err != nil {
				t.Fatal(err)
			}
			if err := dev.Resize(t.Context(), grown); err != nil {
				t.Fatal(err)
			}
			if fstype == "ext4" {
				run(t, "resize2fs", dev.Path())
			} else {
				run(t, "xfs_growfs", dir)
			}
			stop()
			var fs unix.Statfs_t
			if err := unix.Statfs(dir, &fs); err != nil {
				t.Fatal(err)
			}
			if got := int64(fs.Blocks) * fs.Bsize; got < size+size/6 {
				t.Errorf("filesystem has %d bytes after growing", got)
			}
			run(t, "umount", dir)
			if fstype == "ext4" {
				run(t, "e2fsck", "-fn", dev.Path())
			} else {
				run(t, "xfs_repair", "-n", dev.Path())
			}
			if err := dev.Health(); err != nil {
				t.Error(err)
			}
			if err := dev.Detach(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := dev.Health(); !errors.Is(err, nbdexport.ErrDeviceGone) {
				t.Errorf("health after detach: %v, want ErrDeviceGone", err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// keepWriting writes and syncs a file until the returned function is called.
func keepWriting(t *testing.T, path string) (stop func()) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { // ends with ctx
		buf := make([]byte, 64<<10)
		for n := int64(0); ctx.Err() == nil; n++ {
			if _, err := f.WriteAt(buf, n%64*int64(len(buf))); err != nil {
				done <- err
				return
			}
			if err := f.Sync(); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	return func() {
		t.Helper()
		cancel()
		if err := errors.Join(<-done, f.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestChildrenInheritNothing checks that a child of the serving process holds no descriptor of a
// device: a copy of the socket would hide the process's death from the kernel.
func TestChildrenInheritNothing(t *testing.T) {
	attach(t, newAttacher(t), newDisk(t, "raw", 16<<20), nbdexport.DeviceOptions{ID: "v.g1"})
	if out := run(t, "ls", "-l", "/proc/self/fd"); strings.Contains(out, "socket:") || strings.Contains(out, "nbd") {
		t.Errorf("a child has a descriptor of the device:\n%s", out)
	}
}

// TestMoreThanSixteen attaches more devices than the kernel makes in advance.
func TestMoreThanSixteen(t *testing.T) {
	a := newAttacher(t)
	seen := make(map[string]bool)
	for i := range 24 {
		id := fmt.Sprintf("many-%d.g1", i)
		dev := attach(t, a, newDisk(t, "raw", 16<<20), nbdexport.DeviceOptions{ID: id})
		if seen[dev.Path()] {
			t.Fatalf("%s was given twice", dev.Path())
		}
		seen[dev.Path()] = true
		if got := attribute(t, dev, "backend"); !strings.HasPrefix(got, id+"@") {
			t.Errorf("backend identifier %q, want %s@...", got, id)
		}
		if got := attribute(t, dev, "queue/io_timeout"); got != "1000" {
			t.Errorf("io_timeout %s ms, want 1000", got)
		}
		if err := dev.Health(); err != nil {
			t.Error(err)
		}
	}
	if !seen["/dev/nbd20"] {
		t.Errorf("no device beyond the sixteenth: %v", seen)
	}
}

// TestDetachWaitsForOpeners checks that neither a mount nor another process loses its device.
func TestDetachWaitsForOpeners(t *testing.T) {
	a := newAttacher(t)
	dev := attach(t, a, newDisk(t, "raw", 64<<20), nbdexport.DeviceOptions{ID: "busy.g1"})
	checkBusy := func(opener string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := dev.Detach(ctx); !errors.Is(err, nbdexport.ErrDeviceBusy) {
			t.Fatalf("detach with %s: %v, want ErrDeviceBusy", opener, err)
		}
		if err := dev.Health(); err != nil {
			t.Fatalf("health after a refused detach: %v", err)
		}
	}
	run(t, "mkfs.ext4", "-q", dev.Path())
	dir := t.TempDir()
	run(t, "mount", dev.Path(), dir)
	checkBusy("a mount")
	run(t, "umount", dir)

	f, err := os.Open(dev.Path())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.Stdin = f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	checkBusy("an opener")
	cmd.Process.Kill()
	cmd.Wait()
	if err := dev.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestReadOnly checks that the kernel refuses writes and passes on no discard.
func TestReadOnly(t *testing.T) {
	a := newAttacher(t)
	d := newDisk(t, "raw", 16<<20).(*nbdtest.FileBackend)
	dev := attach(t, a, d, nbdexport.DeviceOptions{ID: "ro.g1", ReadOnly: true, Discard: true})
	if got := attribute(t, dev, "ro"); got != "1" {
		t.Errorf("ro is %s, want 1", got)
	}
	if err := exec.Command("blkdiscard", "-f", dev.Path()).Run(); err == nil {
		t.Error("blkdiscard of a read-only device succeeded")
	}
	run(t, "dd", "if="+dev.Path(), "of=/dev/null", "bs=1M")
	if d.Writes.Load() != 0 || d.Trimmed.Load() != 0 {
		t.Error("a change has reached the backend")
	}
}

// TestDiscardOption checks that discards reach the backend, or not.
func TestDiscardOption(t *testing.T) {
	for _, discard := range []bool{false, true} {
		t.Run(fmt.Sprint(discard), func(t *testing.T) {
			a := newAttacher(t)
			d := newDisk(t, "raw", 16<<20).(*nbdtest.FileBackend)
			dev := attach(t, a, d, nbdexport.DeviceOptions{ID: "discard.g1", Discard: discard})
			if err := exec.Command("blkdiscard", "-f", dev.Path()).Run(); (err == nil) != discard {
				t.Errorf("blkdiscard: %v", err)
			}
			if got := d.Trimmed.Load(); (got == 16<<20) != discard {
				t.Errorf("%d bytes were discarded", got)
			}
		})
	}
}

// TestConnectionLost cuts the connection of a device that is being read, in a process that lives on. It is
// replaced, and the reader sees nothing of it.
func TestConnectionLost(t *testing.T) {
	a := newAttacher(t)
	d := newDisk(t, "raw", 16<<20)
	before := sockets(t)
	dev := attach(t, a, d, nbdexport.DeviceOptions{ID: "lost.g1"})
	for range 3 {
		read := make(chan error, 1)
		go func() { read <- exec.Command("dd", "if="+dev.Path(), "of=/dev/null", "bs=64k", "iflag=direct").Run() }() // ends with dd
		now := sockets(t)
		for fd := range now {
			if !before[fd] {
				if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := <-read; err != nil {
			t.Errorf("reading while the connection is lost: %v", err)
		}
		deadline := time.Now().Add(time.Minute)
		for err := dev.Health(); err != nil; err = dev.Health() {
			if time.Now().After(deadline) {
				t.Fatalf("health: %v", err)
			}
			time.Sleep(time.Millisecond)
		}
		run(t, "dd", "if="+dev.Path(), "of=/dev/null", "bs=64k", "iflag=direct")
	}
	if err := d.Grow(32 << 20); err != nil {
		t.Fatal(err)
	}
	if err := dev.Resize(t.Context(), 32<<20); err != nil {
		t.Error(err)
	}
}

// TestIndexTakenByAnother disconnects a device behind its owner's back and gives its index to
// another disk. The first owner must see that, and leave the other alone.
func TestIndexTakenByAnother(t *testing.T) {
	a := newAttacher(t)
	first := attach(t, a, newDisk(t, "raw", 16<<20), nbdexport.DeviceOptions{ID: "first.g1"})
	run(t, "nbd-client", "-d", first.Path())
	checkGone := func() {
		t.Helper()
		if err := first.Health(); !errors.Is(err, nbdexport.ErrDeviceGone) {
			t.Fatalf("health: %v, want ErrDeviceGone", err)
		}
		if err := first.Resize(t.Context(), 16<<20); !errors.Is(err, nbdexport.ErrDeviceGone) {
			t.Errorf("resize: %v, want ErrDeviceGone", err)
		}
	}
	checkGone()
	second := attach(t, a, newDisk(t, "raw", 16<<20), nbdexport.DeviceOptions{ID: "second.g1"})
	if second.Path() != first.Path() {
		t.Fatalf("the second device is %s, not %s: nothing is tested", second.Path(), first.Path())
	}
	checkGone()
	if err := first.Detach(t.Context()); err != nil {
		t.Error(err)
	}
	if err := second.Health(); err != nil {
		t.Errorf("health of the second device: %v", err)
	}
	run(t, "mkfs.ext4", "-q", second.Path())
	run(t, "e2fsck", "-fn", second.Path())
}

// sockets returns the descriptors of this process that are Unix sockets.
func sockets(t *testing.T) map[int]bool {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[int]bool)
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == unix.AF_UNIX {
			found[fd] = true
		}
	}
	return found
}

// runDir is the run-dir of the tests and of the processes they kill.
const runDir = "/run/csi-qcow2"

// holderEnv makes the test binary a process that serves a device until it is killed.
const holderEnv = "GUEST_HOLDER"

// patienceOfKernel is how long something must stand still until the kernel calls that trouble. The machine's
// processors may be held up for many seconds by other work of the one that it runs on.
var patienceOfKernel = map[string]string{
	"/proc/sys/kernel/hung_task_timeout_secs":               "60",
	"/proc/sys/kernel/watchdog_thresh":                      "60",
	"/sys/module/rcupdate/parameters/rcu_cpu_stall_timeout": "120",
}

func TestMain(m *testing.M) {
	if os.Getenv(holderEnv) != "" {
		fmt.Println(hold())
		os.Exit(1)
	}
	for path, seconds := range patienceOfKernel {
		if err := os.WriteFile(path, []byte(seconds), 0); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// hold serves a device and prints its path. It returns only on failure.
func hold() error {
	b, err := nbdtest.NewFileBackend("/tmp/held", 16<<20)
	if err != nil {
		return err
	}
	a, err := nbdexport.NewAttacher(nbdexport.KindNBD, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		return err
	}
	dev, err := a.Attach(context.Background(), b, nbdexport.DeviceOptions{ID: "held.g1"})
	if err != nil {
		return err
	}
	fmt.Println(dev.Path())
	select {}
}

// TestStaleAfterKill kills a process that serves a device, and cleans up after it.
func TestStaleAfterKill(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holderEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "/dev/nbd") {
		t.Fatalf("holder: %q, %v", line, err)
	}
	path := strings.TrimSpace(line)
	cmd.Process.Kill()
	cmd.Wait()

	a := newAttacher(t)
	stale, err := a.Stale(t.Context())
	if err != nil || len(stale) != 1 || stale[0].ID != "held.g1" || stale[0].Path != path || stale[0].Kind != nbdexport.KindNBD {
		t.Fatalf("stale: %+v, %v; want %s", stale, err, path)
	}
	other, err := nbdexport.NewAttacher(nbdexport.KindNBD, nbdexport.AttacherOptions{RunDir: "/run/other"})
	if err != nil {
		t.Fatal(err)
	}
	if theirs, err := other.Stale(t.Context()); err != nil || len(theirs) != 0 {
		t.Errorf("stale devices of another run-dir: %+v, %v", theirs, err)
	}
	if err := stale[0].Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	if stale, err := a.Stale(t.Context()); err != nil || len(stale) != 0 {
		t.Errorf("stale after clean: %+v, %v", stale, err)
	}
}
