package volume

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
)

// newFilesystem returns a directory on a new filesystem of the type, on a loop device.
func newFilesystem(t *testing.T, fstype string, mkfs ...string) string {
	t.Helper()
	base := storagetest.MemoryDir(t)
	image, dir := filepath.Join(base, "disk"), filepath.Join(base, "mnt")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 1<<30); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{append(append([]string{"mkfs." + fstype, "-q"}, mkfs...), image), {"mount", "-o", "loop", image, dir}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		// mkfs.btrfs looks behind all loop devices of the machine, and gives up when
		// one is on a mount whose server is dead, as other packages' tests have them for a moment.
		for end := time.Now().Add(5 * time.Minute); err != nil && strings.Contains(strings.ToLower(string(out)), unix.ENOTCONN.Error()) && time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
		}
		if err != nil {
			t.Fatalf("%q: %v\n%s\nthis test needs root, loop devices, xfsprogs and btrfs-progs (hack/deps.sh)", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	pool := filepath.Join(dir, "pool")
	if err := os.Mkdir(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	return pool
}

// used returns the bytes in use on the filesystem of a pool, everything written back.
func used(t *testing.T, p *Pool) int64 {
	t.Helper()
	if err := unix.Syncfs(p.dir.Fd()); err != nil {
		t.Fatal(err)
	}
	c, err := p.Capacity()
	if err != nil {
		t.Fatal(err)
	}
	return c.Total - c.Available
}

// A reflink is an independent volume at once: it shares the blocks of its source
// through the host, takes next to no space, shows no snapshot of it, and stays
// when the source goes. The source is attached and written to all the while.
func TestReflink(t *testing.T) {
	const n = 1 << 20
	for _, fstype := range []string{"xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			p := newPoolIn(t, newFilesystem(t, fstype))
			a, err := p.Create(t.Context(), CreateRequest{Name: "a", Size: SizeRange{Required: 128 * n}, Params: DefaultParams()})
			if err != nil {
				t.Fatal(err)
			}
			write(t, p, a.ID, 0, 1, 64*n)
			s := snapshot(t, p, "s", a.ID)
			write(t, p, a.ID, 0, 2, n)
			attached := open(t, p, a.ID)
			before := used(t, p)
			stop, writing := make(chan struct{}), make(chan error, 1)
			go func() { // ends when stop is closed
				var err error
				for i := int64(0); err == nil; i++ {
					select {
					case <-stop:
						writing <- nil
						return
					default:
						_, err = attached.Image.WriteAt([]byte{9}, 100*n+i%(8*n))
					}
				}
				writing <- err
			}()
			restored := clone(t, p, "restored", Source{Snapshot: s.ID}, CloneReflink)
			cloned := clone(t, p, "cloned", Source{Volume: a.ID}, CloneAuto)
			close(stop)
			if err := <-writing; err != nil {
				t.Fatal(err)
			}
			if grown := used(t, p) - before; grown > 32*n {
				t.Errorf("two reflinks of 64 MiB take %d bytes", grown)
			}
			if err := attached.Close(); err != nil {
				t.Fatal(err)
			}
			reap(t, p)
			for _, v := range []Volume{restored, cloned} {
				info := qemutest.GetInfo(t, imagePath(p, v.ID))
				if info.BackingFilename != "" || len(info.Snapshots) > 0 || v.Copy.Pending {
					t.Errorf("%s: got backing file %q, snapshots %+v, copy %+v", v.Name, info.BackingFilename, info.Snapshots, v.Copy)
				}
			}
			if hasSnapshot(t, p, a.ID, p.makeID(kindHidden, cloned.ID, 0)) {
				t.Error("the hidden snapshot is left in the source")
			}
			larger, err := p.Create(t.Context(), CreateRequest{Name: "larger", Size: SizeRange{Required: 256 * n},
				Params: restored.Params, Source: Source{Snapshot: s.ID}})
			if err != nil || larger.Size != 256*n {
				t.Fatalf("larger: %d bytes, %v", larger.Size, err)
			}
			remove(t, p, s.ID, a.ID)
			reap(t, p)
			if _, err := os.Stat(imagePath(p, a.ID)); !os.IsNotExist(err) {
				t.Errorf("the source is left: %v", err)
			}
			wantBytes(t, p, restored.ID, 0, 1, 64*n)
			wantBytes(t, p, larger.ID, 0, 1, 64*n)
			wantBytes(t, p, larger.ID, 64*n, 0, 192*n)
			wantBytes(t, p, cloned.ID, 0, 2, n)
			wantBytes(t, p, cloned.ID, n, 1, 63*n)
		})
	}
}

// A reflink of a linked clone is linked to the same source.
func TestReflinkOfClone(t *testing.T) {
	const n = 1 << 20
	p := newPoolIn(t, newFilesystem(t, "xfs"))
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, 2*n)
	linked := clone(t, p, "linked", Source{Volume: a.ID}, CloneLinked)
	write(t, p, linked.ID, 0, 2, n)
	copied := clone(t, p, "copied", Source{Volume: linked.ID}, CloneReflink)
	remove(t, p, linked.ID, a.ID)
	reap(t, p)
	if _, err := os.Stat(imagePath(p, linked.ID)); !os.IsNotExist(err) {
		t.Errorf("the linked clone is left: %v", err)
	}
	wantBytes(t, p, copied.ID, 0, 2, n)
	wantBytes(t, p, copied.ID, n, 1, n)
	wantQEMU(t, imagePath(p, copied.ID), n, 1, n)
	remove(t, p, copied.ID)
	reap(t, p)
	if all := files(t, p.Path()); len(all) > 0 {
		t.Errorf("left: %q", all)
	}
}

// Where blocks cannot be shared, reflink says so and auto makes a linked clone.
func TestReflinkRefusals(t *testing.T) {
	ext4 := newPoolIn(t, newFilesystem(t, "ext4"))
	xfs := newPoolIn(t, newFilesystem(t, "xfs"))
	for _, c := range []struct {
		p           *Pool
		clusterSize int64
		says        string
	}{{ext4, 64 << 10, "XFS or btrfs"}, {xfs, 4096, "clusterSize"}} {
		a := create(t, c.p, "a", Source{})
		write(t, c.p, a.ID, 0, 1, 1<<20)
		q := DefaultParams()
		q.ClusterSize, q.CloneMode = c.clusterSize, CloneReflink
		_, err := c.p.Create(t.Context(), CreateRequest{Name: "reflink", Params: q, Source: Source{Volume: a.ID}})
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("got %v, want ErrInvalid that says %q", err, c.says)
		}
		q.CloneMode = CloneAuto
		v, err := c.p.Create(t.Context(), CreateRequest{Name: "auto", Params: q, Source: Source{Volume: a.ID}})
		if err != nil {
			t.Fatal(err)
		}
		if qemutest.GetInfo(t, imagePath(c.p, v.ID)).BackingFilename == "" {
			t.Error("auto: the clone is not linked")
		}
		wantBytes(t, c.p, v.ID, 0, 1, 1<<20)
	}
}

// A reflink of a clone needs what the clone was made from, also when the clone is
// gone, and another of its name is made.
func TestReflinkOutlivesTheNameOfItsSource(t *testing.T) {
	const n = 1 << 20
	p := newPoolIn(t, newFilesystem(t, "xfs"))
	a := create(t, p, "a", Source{})
	write(t, p, a.ID, 0, 1, n)
	first := clone(t, p, "c", Source{Volume: a.ID}, CloneLinked)
	kept := clone(t, p, "kept", Source{Volume: first.ID}, CloneReflink)
	remove(t, p, first.ID)
	reap(t, p)
	write(t, p, a.ID, 0, 2, n)
	second := clone(t, p, "c", Source{Volume: a.ID}, CloneLinked)
	reap(t, p)
	wantBytes(t, p, kept.ID, 0, 1, n)
	wantBytes(t, p, second.ID, 0, 2, n)
	remove(t, p, kept.ID, second.ID, a.ID)
	reap(t, p)
	if left := files(t, p.Path()); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
