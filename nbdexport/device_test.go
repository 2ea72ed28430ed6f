package nbdexport_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// run runs a command and fails the test when it fails.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s(install: apt-get install e2fsprogs xfsprogs util-linux fio)", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// newAttacher returns an attacher of FUSE devices and its run-dir. After the test nothing may be
// left of it.
func newAttacher(t *testing.T) (*nbdexport.Attacher, string) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	runDir := t.TempDir()
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
		checkNothingLeft(t, runDir)
		goleak.VerifyNone(t, before)
	})
	return a, runDir
}

// checkNothingLeft fails the test when a mount, a loop device or a directory below runDir exists.
func checkNothingLeft(t *testing.T, runDir string) {
	t.Helper()
	for name, text := range map[string]string{"losetup -a": run(t, "losetup", "-a"), "/proc/mounts": readFile(t, "/proc/mounts")} {
		if strings.Contains(text, runDir) {
			t.Errorf("%s still names %s:\n%s", name, runDir, text)
		}
	}
	// This finds loop devices too whose mount is out of the tree.
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: runDir})
	if err != nil {
		t.Fatal(err)
	}
	if left, err := a.Stale(context.Background()); err != nil || len(left) > 0 {
		t.Errorf("left: %+v, %v", left, err)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newBackend(t *testing.T, size int64) *nbdtest.FileBackend {
	t.Helper()
	b, err := nbdtest.NewFileBackend(filepath.Join(t.TempDir(), "disk.raw"), size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// attach attaches b; the device is detached at the end of the test if the test has not done so.
func attach(t *testing.T, a *nbdexport.Attacher, b nbdexport.Backend, o nbdexport.DeviceOptions) nbdexport.Device {
	t.Helper()
	dev, err := a.Attach(t.Context(), b, o)
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

// mount mounts a device until the end of the test or until the returned function is called.
func mount(t *testing.T, dev, fstype string) (dir string, unmount func()) {
	t.Helper()
	dir = t.TempDir()
	run(t, "mount", "-t", fstype, dev, dir)
	var once sync.Once
	unmount = func() { once.Do(func() { run(t, "umount", dir) }) }
	t.Cleanup(unmount)
	return dir, unmount
}

// fillFiles writes files of pseudo-random content below dir and returns their checksums.
func fillFiles(t *testing.T, dir string, seed uint64) map[string][32]byte {
	t.Helper()
	r := rand.New(rand.NewPCG(seed, 0))
	sums := make(map[string][32]byte)
	for i := range 40 {
		data := make([]byte, 1+r.IntN(600_000))
		for j := range data {
			data[j] = byte(r.Uint32())
		}
		path := filepath.Join(dir, fmt.Sprintf("file%d", i))
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		sums[path] = sha256.Sum256(data)
	}
	unix.Sync()
	return sums
}

func checkFiles(t *testing.T, sums map[string][32]byte) {
	t.Helper()
	for path, want := range sums {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(b) != want {
			t.Fatalf("%s: content differs", path)
		}
	}
}

// TestFilesystemOnFUSEDevice is the life of a device under a filesystem.
func TestFilesystemOnFUSEDevice(t *testing.T) {
	const size, grown = 512 << 20, 768 << 20
	for _, tt := range []struct {
		fstype      string
		mkfs, check []string
		grow        func(dev, dir string) []string
	}{
		{"ext4", []string{"mkfs.ext4", "-q"}, []string{"e2fsck", "-fn"}, func(dev, _ string) []string { return []string{"resize2fs", dev} }},
		{"xfs", []string{"mkfs.xfs", "-q"}, []string{"xfs_repair", "-n"}, func(_, dir string) []string { return []string{"xfs_growfs", dir} }},
	} {
		for _, blockSize := range []int{512, 4096} {
			t.Run(fmt.Sprintf("%s/%d", tt.fstype, blockSize), func(t *testing.T) {
				a, _ := newAttacher(t)
				b := newBackend(t, size)
				dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1", BlockSize: blockSize, Discard: true})
				run(t, tt.mkfs[0], append(tt.mkfs[1:], dev.Path())...)
				dir, unmount := mount(t, dev.Path(), tt.fstype)
				sums := fillFiles(t, dir, 1)
				run(t, "fio", "--name=verify", "--directory="+dir, "--size=16m", "--rw=randrw", "--bsrange=512-256k", "--ioengine=psync",
					"--numjobs=2", "--verify=crc32c", "--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", "--fsync=64", "--minimal")

				if got := b.Flushes.Load(); got == 0 {
					t.Error("no flush has reached the backend")
				}
				for _, path := range []string{"verify.0.0", "verify.1.0"} {
					if err := os.Remove(filepath.Join(dir, path)); err != nil {
						t.Fatal(err)
					}
				}
				unix.Sync()
				before := b.Unmapped.Load()
				run(t, "fstrim", "-v", dir)
				if got := b.Unmapped.Load() - before; got < 16<<20 {
					t.Errorf("fstrim has unmapped %d bytes, want at least 16 MiB", got)
				}

				if err := b.Grow(grown); err != nil {
					t.Fatal(err)
				}
				if err := dev.Resize(t.Context(), grown); err != nil {
					t.Fatal(err)
				}
				if tt.fstype == "ext4" && !mayGrowExt4Mounted(t) {
					unmount()
					run(t, "e2fsck", "-f", "-p", dev.Path())
					run(t, "resize2fs", dev.Path())
					run(t, "mount", dev.Path(), dir)
					t.Cleanup(func() { exec.Command("umount", dir).Run() })
					unmount = func() { run(t, "umount", dir) }
				} else {
					grow := tt.grow(dev.Path(), dir)
					run(t, grow[0], grow[1:]...)
				}
				var fs unix.Statfs_t
				if err := unix.Statfs(dir, &fs); err != nil {
					t.Fatal(err)
				}
				if got := fs.Blocks * uint64(fs.Bsize); got < size+size/4 {
					t.Errorf("filesystem has %d bytes after growing", got)
				}
				checkFiles(t, sums)
				if err := dev.Health(); err != nil {
					t.Error(err)
				}
				unmount()
				run(t, tt.check[0], append(tt.check[1:], dev.Path())...)
				if err := dev.Detach(t.Context()); err != nil {
					t.Fatal(err)
				}
				if err := dev.Health(); !errors.Is(err, nbdexport.ErrDeviceGone) {
					t.Errorf("health after detach: %v, want ErrDeviceGone", err)
				}
			})
		}
	}
}

// mayGrowExt4Mounted reports whether ext4 lets this process grow it while mounted: it asks for
// CAP_SYS_RESOURCE, which root in a container may lack. test/kernel grows it mounted in any case.
func mayGrowExt4Mounted(t *testing.T) bool {
	for line := range strings.Lines(readFile(t, "/proc/self/status")) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("/proc/self/status has no CapEff")
	return false
}

// TestDetachWaitsForOpeners checks that neither a mount nor a plain opener loses its device.
func TestDetachWaitsForOpeners(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 64<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	run(t, "mkfs.ext4", "-q", dev.Path())

	detach := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		return dev.Detach(ctx)
	}
	checkBusy := func(opener string) {
		t.Helper()
		if err := detach(); !errors.Is(err, nbdexport.ErrDeviceBusy) {
			t.Fatalf("detach with %s: %v, want ErrDeviceBusy", opener, err)
		}
		if err := dev.Health(); err != nil {
			t.Fatalf("health after a refused detach: %v", err)
		}
	}
	dir, unmount := mount(t, dev.Path(), "ext4")
	checkBusy("a mount")
	sums := fillFiles(t, dir, 2)
	checkFiles(t, sums)
	unmount()

	f, err := os.OpenFile(dev.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	checkBusy("an opener")
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Errorf("write after a refused detach: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	// The refused detach must not linger: the device outlives its last opener.
	if err := dev.Health(); err != nil {
		t.Errorf("health after the last close: %v", err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Errorf("second detach: %v", err)
	}
}

// TestDetachPastSpectators checks that whoever looks at the FUSE mount itself does not keep the device.
func TestDetachPastSpectators(t *testing.T) {
	a, runDir := newAttacher(t)
	dev := attach(t, a, newBackend(t, 8<<20), nbdexport.DeviceOptions{ID: "v"})
	files, err := filepath.Glob(filepath.Join(runDir, "fuse", "v", "v@*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files in the mount: %v, %v", files, err)
	}
	fd, err := unix.Open(files[0], unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := dev.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pread(fd, make([]byte, 4096), 0); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("read of the file after detach: %v, want ENOTCONN", err)
	}
}

// TestDetachWritesBack checks that what a writer left in the page cache is in the backend.
func TestDetachWritesBack(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	want := make([]byte, 8<<20)
	r := rand.New(rand.NewPCG(3, 0))
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	if err := os.WriteFile(dev.Path(), want, 0); err != nil {
		t.Fatal(err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := b.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(got) != sha256.Sum256(want) {
		t.Error("the backend differs from what was written")
	}
	if b.Flushes.Load() == 0 {
		t.Error("no flush at detach")
	}
}

// TestDetachReportsLostWrites checks that a device whose backend fails is removed all the same, and
// that its user is told.
func TestDetachReportsLostWrites(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	fail := error(unix.EIO)
	b.FlushError.Store(&fail)
	if err := dev.Detach(t.Context()); !errors.Is(err, nbdexport.ErrNotFlushed) {
		t.Errorf("detach: %v, want ErrNotFlushed", err)
	}
	if err := dev.Detach(t.Context()); err != nil {
		t.Errorf("second detach: %v", err)
	}
}

// TestRefusedDetachRemembersLostWrites checks that what the kernel says once about lost writes is
// not forgotten when the detach that heard it is refused.
func TestRefusedDetachRemembersLostWrites(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	f, err := os.OpenFile(dev.Path(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	fail := error(unix.EIO)
	b.WriteError.Store(&fail)
	if _, err := f.Write(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := dev.Detach(ctx); !errors.Is(err, nbdexport.ErrDeviceBusy) {
		t.Errorf("detach with an opener: %v, want ErrDeviceBusy", err)
	}
	b.WriteError.Store(nil)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := dev.Detach(t.Context()); !errors.Is(err, nbdexport.ErrNotFlushed) {
		t.Errorf("detach: %v, want ErrNotFlushed", err)
	}
}

// TestBackendErrors checks which error a user of the device sees.
func TestBackendErrors(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1"})
	f, err := os.OpenFile(dev.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buf := make([]byte, 8192)
	for _, tt := range []struct{ fail, want error }{
		{unix.EIO, unix.EIO},
		{fmt.Errorf("host full: %w", unix.ENOSPC), unix.ENOSPC},
		{errors.New("no number"), unix.EIO},
	} {
		b.WriteError.Store(&tt.fail)
		if _, err := unix.Pwrite(int(f.Fd()), aligned(buf), 0); !errors.Is(err, tt.want) {
			t.Errorf("write with backend error %v: %v, want %v", tt.fail, err, tt.want)
		}
	}
	b.WriteError.Store(nil)
	if _, err := unix.Pwrite(int(f.Fd()), aligned(buf), 0); err != nil {
		t.Errorf("write after the errors: %v", err)
	}
}

// aligned is the first page of b, which has two.
func aligned(b []byte) []byte { return alignedTo(b, 4096) }

// TestReadOnlyDevice checks that the kernel refuses writes.
func TestReadOnlyDevice(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1", ReadOnly: true})
	if f, err := os.OpenFile(dev.Path(), os.O_RDWR, 0); err == nil {
		_, err := f.Write(make([]byte, 4096))
		f.Close()
		if err == nil {
			t.Error("write to a read-only device succeeded")
		}
	}
	f, err := os.Open(dev.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := io.Copy(io.Discard, f); n != 8<<20 || err != nil {
		t.Errorf("read %d bytes: %v", n, err)
	}
	if b.Writes.Load() != 0 {
		t.Error("a write has reached the backend")
	}
}

// TestDiscardOption checks that without it no discard reaches the backend and zeroing keeps the space.
func TestDiscardOption(t *testing.T) {
	for _, discard := range []bool{false, true} {
		t.Run(fmt.Sprint(discard), func(t *testing.T) {
			a, _ := newAttacher(t)
			b := newBackend(t, 8<<20)
			dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1", Discard: discard})
			ones := make([]byte, 8<<20)
			for i := range ones {
				ones[i] = 0xff
			}
			if err := os.WriteFile(dev.Path(), ones, 0); err != nil {
				t.Fatal(err)
			}
			unix.Sync()
			// Kernels differ in whether they tell the caller that a discard was refused.
			if err := exec.Command("blkdiscard", "-f", "-l", "1M", dev.Path()).Run(); err != nil && discard {
				t.Errorf("blkdiscard: %v", err)
			}
			run(t, "blkdiscard", "-f", "-z", "-o", "2M", "-l", "1M", dev.Path())
			if discard && b.Unmapped.Load() == 0 || !discard && b.Unmapped.Load() != 0 {
				t.Errorf("unmapped %d bytes", b.Unmapped.Load())
			}
			// What the kernel takes for zeroes after BLKZEROOUT must be zeroes.
			got := make([]byte, 1<<20)
			if _, err := b.ReadAt(got, 2<<20); err != nil {
				t.Fatal(err)
			}
			for i, c := range got {
				if c != 0 {
					t.Fatalf("byte %#x after zeroing: %#x", i, c)
				}
			}
			if _, err := b.ReadAt(got, 3<<20); err != nil || got[0] != 0xff {
				t.Errorf("byte behind the zeroed range: %#x, %v", got[0], err)
			}
		})
	}
}

// TestAttachRefuses checks the errors of bad arguments; nothing may be left of them.
func TestAttachRefuses(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 1<<20)
	odd := newBackend(t, 1<<20+512)
	attach(t, a, b, nbdexport.DeviceOptions{ID: "taken"})
	for _, tt := range []struct {
		name string
		b    nbdexport.Backend
		o    nbdexport.DeviceOptions
		want string
	}{
		{"no ID", b, nbdexport.DeviceOptions{}, "device ID"},
		{"ID with a slash", b, nbdexport.DeviceOptions{ID: "../x"}, "device ID"},
		{"ID that is a dot", b, nbdexport.DeviceOptions{ID: "."}, "device ID"},
		{"long ID", b, nbdexport.DeviceOptions{ID: strings.Repeat("x", 129)}, "device ID"},
		{"block size", b, nbdexport.DeviceOptions{ID: "v", BlockSize: 1024}, "block size 1024"},
		{"size", odd, nbdexport.DeviceOptions{ID: "v", BlockSize: 4096}, "multiple of the block size"},
		{"same ID", b, nbdexport.DeviceOptions{ID: "taken"}, "attached already"},
	} {
		if _, err := a.Attach(t.Context(), tt.b, tt.o); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want ...%s...", tt.name, err, tt.want)
		}
	}
}

// TestResizeRefuses checks the sizes that a device cannot take.
func TestResizeRefuses(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 1<<20)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "v"})
	for _, tt := range []struct {
		size int64
		want string
	}{{1<<20 - 512, "smaller"}, {1<<20 + 1, "multiple"}, {2 << 20, "beyond the end"}} {
		if err := dev.Resize(t.Context(), tt.size); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("resize to %d: %v, want ...%s...", tt.size, err, tt.want)
		}
	}
	if got := dev.Size(); got != 1<<20 {
		t.Errorf("size %d", got)
	}
}

// TestTwentyDevices attaches and uses many at once.
func TestTwentyDevices(t *testing.T) {
	a, _ := newAttacher(t)
	var wg sync.WaitGroup
	for i := range 20 {
		b := newBackend(t, 32<<20)
		wg.Go(func() {
			dev, err := a.Attach(t.Context(), b, nbdexport.DeviceOptions{ID: fmt.Sprintf("vol-%d.g1", i), Discard: true})
			if err != nil {
				t.Error(err)
				return
			}
			if out, err := exec.Command("mkfs.ext4", "-q", dev.Path()).CombinedOutput(); err != nil {
				t.Errorf("mkfs.ext4 %s: %v\n%s", dev.Path(), err, out)
			}
			if out, err := exec.Command("e2fsck", "-fn", dev.Path()).CombinedOutput(); err != nil {
				t.Errorf("e2fsck %s: %v\n%s", dev.Path(), err, out)
			}
			if err := dev.Detach(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestResizeUnderWrites: when a resize returns, all of the device can be read, whatever is written meanwhile.
func TestResizeUnderWrites(t *testing.T) {
	const size, step, steps = 64 << 20, 1 << 20, 40
	a, _ := newAttacher(t)
	b := newBackend(t, size)
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "v"})
	f, err := os.OpenFile(dev.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	ctx, stop := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	defer writers.Wait()
	defer stop()
	for i := range int64(8) {
		writers.Go(func() { // ends with ctx
			block := aligned(make([]byte, 2*4096))
			for n := int64(0); ctx.Err() == nil; n++ {
				if _, err := f.WriteAt(block, (n%1024*8+i)*4096); err != nil {
					t.Errorf("write: %v", err)
					return
				}
			}
		})
	}
	last := aligned(make([]byte, 2*4096))
	for i := range int64(steps) {
		next := size + (i+1)*step
		if err := b.Grow(next); err != nil {
			t.Fatal(err)
		}
		if err := dev.Resize(t.Context(), next); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(last, next-4096); err != nil {
			t.Fatalf("the end of %d bytes: %v", next, err)
		}
	}
}

// TestDiscardLimitOfAnEarlierUser attaches where an earlier user of the loop device has forbidden discards, which
// the kernel keeps, and in newer versions takes nothing back of.
func TestDiscardLimitOfAnEarlierUser(t *testing.T) {
	a, _ := newAttacher(t)
	b := newBackend(t, 8<<20)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", file))
	queue := filepath.Join("/sys/block", filepath.Base(loop), "queue/discard_max_bytes")
	err := os.WriteFile(queue, []byte("0"), 0)
	run(t, "losetup", "--detach", loop)
	if err != nil {
		t.Fatal(err)
	}
	dev := attach(t, a, b, nbdexport.DeviceOptions{ID: "vol-1.g1", Discard: true}) // the lowest that is free: the same
	queue = filepath.Join("/sys/block", filepath.Base(dev.Path()), "queue/discard_max_bytes")
	if limit := strings.TrimSpace(readFile(t, queue)); limit == "0" {
		t.Errorf("%s takes no discards", dev.Path())
	}
}
