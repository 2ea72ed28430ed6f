package nbdexport_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// holderEnv makes the test binary a process that attaches a device and serves it until it is killed:
// the run-dir and the disk file.
const holderEnv = "NBDEXPORT_TEST_HOLDER"

func TestMain(m *testing.M) {
	if args := os.Getenv(holderEnv); args != "" {
		runDir, disk, _ := strings.Cut(args, ":")
		fmt.Println(hold(runDir, disk))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// hold serves disk as a device and prints its path. It returns only on failure.
func hold(runDir, disk string) error {
	b, err := nbdtest.OpenFileBackend(disk)
	if err != nil {
		return err
	}
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		return err
	}
	dev, err := a.Attach(context.Background(), b, nbdexport.DeviceOptions{ID: "vol-1.g1", Discard: true})
	if err != nil {
		return err
	}
	fmt.Println(dev.Path())
	select {}
}

// startHolder starts a process that serves disk, and returns the device and how to kill it.
func startHolder(t *testing.T, runDir, disk string) (dev string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holderEnv+"="+runDir+":"+disk)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(kill)
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "/dev/") {
		t.Fatalf("holder: %q, %v", line, err)
	}
	return strings.TrimSpace(line), kill
}

// waitForFile waits until a file has a size.
func waitForFile(t *testing.T, path string, size int64) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		if fi, err := os.Stat(path); err == nil && fi.Size() >= size {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not grow to %d bytes", path, size)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestStaleAfterKill kills a process that serves a mounted device in use, and cleans up after it.
func TestStaleAfterKill(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) { testStaleAfterKill(t, fstype) })
	}
}

func testStaleAfterKill(t *testing.T, fstype string) {
	runDir := t.TempDir()
	disk := filepath.Join(t.TempDir(), "disk.raw")
	b, err := nbdtest.NewFileBackend(disk, 512<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	dev, kill := startHolder(t, runDir, disk)
	run(t, "mkfs."+fstype, "-q", dev)
	dir, unmount := mount(t, dev, fstype)
	sums := fillFiles(t, dir, 4)
	busy := exec.Command("dd", "if=/dev/zero", "of="+filepath.Join(dir, "busy"), "bs=64k", "count=1000000", "oflag=direct")
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	waitForFile(t, filepath.Join(dir, "busy"), 1<<20)
	kill()
	if err := busy.Wait(); err == nil {
		t.Error("a writer saw no error when the server was killed")
	}

	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	stale, err := a.Stale(t.Context())
	if err != nil || len(stale) != 1 || stale[0].ID != "vol-1.g1" || stale[0].Path != dev || stale[0].Kind != nbdexport.KindFUSE {
		t.Fatalf("stale: %+v, %v; want %s", stale, err, dev)
	}
	// Another run-dir's process does not see it.
	other, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if theirs, err := other.Stale(t.Context()); err != nil || len(theirs) != 0 {
		t.Errorf("stale devices of another run-dir: %+v, %v", theirs, err)
	}
	// The mount holds it.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := stale[0].Clean(ctx); !errors.Is(err, nbdexport.ErrDeviceBusy) {
		t.Fatalf("clean of a mounted device: %v, want ErrDeviceBusy", err)
	}
	// With the same ID nothing can be attached before it is cleaned.
	if _, err := a.Attach(t.Context(), b, nbdexport.DeviceOptions{ID: "vol-1.g1"}); err == nil {
		t.Fatal("attach over a stale device succeeded")
	}
	unmount()
	if err := stale[0].Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, runDir)
	if stale, err := a.Stale(t.Context()); err != nil || len(stale) != 0 {
		t.Errorf("stale after clean: %+v, %v", stale, err)
	}

	// What the dead process had taken is there.
	again := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	run(t, "mount", again.Path(), dir)
	checkFiles(t, sums)
	run(t, "umount", dir)
	if err := again.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, runDir)
}

// TestStaleAfterDetachedMount finds a loop device whose dead FUSE mount is out of the tree.
func TestStaleAfterDetachedMount(t *testing.T) {
	runDir := t.TempDir()
	disk := filepath.Join(t.TempDir(), "disk.raw")
	b, err := nbdtest.NewFileBackend(disk, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	dev, kill := startHolder(t, runDir, disk)
	kill()
	run(t, "umount", "-l", filepath.Join(runDir, "fuse", "vol-1.g1"))
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	stale, err := a.Stale(t.Context())
	if err != nil || len(stale) != 1 || stale[0].ID != "vol-1.g1" || stale[0].Path != dev {
		t.Fatalf("stale: %+v, %v; want %s", stale, err, dev)
	}
	if err := stale[0].Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, runDir)
}

// TestStaleOfAnotherDirectoryOfThePath takes a device of a process for nobody's, whose run-dir has the same path
// and is another directory: the kernel is one, mount namespaces are many.
func TestStaleOfAnotherDirectoryOfThePath(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run")
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: path})
	if err != nil {
		t.Fatal(err)
	}
	dev := attach(t, a, newBackend(t, 8<<20), nbdexport.DeviceOptions{ID: "vol-1.g1"})
	theirs := path + ".theirs"
	if err := os.Rename(path, theirs); err != nil {
		t.Fatal(err)
	}
	b, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: path})
	if err != nil {
		t.Fatal(err)
	}
	stale, err := b.Stale(t.Context())
	if err != nil || len(stale) != 0 {
		t.Errorf("stale: %+v, %v; want nothing of theirs", stale, err)
	}
	if err := errors.Join(os.RemoveAll(path), os.Rename(theirs, path)); err != nil {
		t.Fatal(err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Error(err)
	}
	checkNothingLeft(t, path)
}

// TestStaleMountWithoutLoop finds a process's mount that died before its loop device.
func TestStaleMountWithoutLoop(t *testing.T) {
	runDir := t.TempDir()
	disk := filepath.Join(t.TempDir(), "disk.raw")
	b, err := nbdtest.NewFileBackend(disk, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	dev, kill := startHolder(t, runDir, disk)
	run(t, "losetup", "-d", dev)
	kill()
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	stale, err := a.Stale(t.Context())
	if err != nil || len(stale) != 1 || stale[0].ID != "vol-1.g1" || stale[0].Path != "" {
		t.Fatalf("stale: %+v, %v; want a mount without a device", stale, err)
	}
	if err := stale[0].Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkNothingLeft(t, runDir)
}

// TestStaleDirectory finds what a process left that died between making a directory and mounting on it.
func TestStaleDirectory(t *testing.T) {
	a, runDir := newAttacher(t)
	if err := os.MkdirAll(filepath.Join(runDir, "fuse", "vol-1.g1"), 0o700); err != nil {
		t.Fatal(err)
	}
	stale, err := a.Stale(t.Context())
	if err != nil || len(stale) != 1 || stale[0].ID != "vol-1.g1" || stale[0].Path != "" {
		t.Fatalf("stale: %+v, %v; want the directory", stale, err)
	}
	if err := stale[0].Clean(t.Context()); err != nil {
		t.Fatal(err)
	}
	attach(t, a, newBackend(t, 1<<20), nbdexport.DeviceOptions{ID: "vol-1.g1"})
	if stale, err := a.Stale(t.Context()); err != nil || len(stale) != 0 {
		t.Errorf("stale with a living device: %+v, %v", stale, err)
	}
}

// TestChildrenInheritNothing checks that a child of the serving process holds no descriptor of a device.
func TestChildrenInheritNothing(t *testing.T) {
	a, _ := newAttacher(t)
	attach(t, a, newBackend(t, 1<<20), nbdexport.DeviceOptions{ID: "v"})
	out := run(t, "ls", "-l", "/proc/self/fd")
	for _, word := range []string{"fuse", "loop", "disk.raw", "socket"} {
		if strings.Contains(out, word) {
			t.Errorf("a child has a descriptor of %q:\n%s", word, out)
		}
	}
}

// alignedTo returns align bytes of b at an address that is a multiple of align.
func alignedTo(b []byte, align int) []byte {
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (align - 1)
	return b[skip : skip+align]
}

// TestHealthAfterAbort checks that a device whose FUSE connection was aborted under it says so, and
// can be detached.
func TestHealthAfterAbort(t *testing.T) {
	a, runDir := newAttacher(t)
	dev := attach(t, a, newBackend(t, 1<<20), nbdexport.DeviceOptions{ID: "v"})
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(runDir, "fuse", "v"), &st); err != nil {
		t.Fatal(err)
	}
	abort := fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", unix.Minor(st.Dev))
	if _, err := os.Stat(abort); err != nil {
		run(t, "mount", "-t", "fusectl", "fusectl", "/sys/fs/fuse/connections")
		t.Cleanup(func() { run(t, "umount", "/sys/fs/fuse/connections") })
	}
	if err := os.WriteFile(abort, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for !errors.Is(dev.Health(), nbdexport.ErrDeviceDead) {
		if time.Now().After(deadline) {
			t.Fatalf("health: %v, want ErrDeviceDead", dev.Health())
		}
		time.Sleep(time.Millisecond)
	}
	if err := dev.Resize(t.Context(), 1<<20); !errors.Is(err, nbdexport.ErrDeviceDead) {
		t.Errorf("resize: %v, want ErrDeviceDead", err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Error(err)
	}
}
