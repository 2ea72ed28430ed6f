package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// newCache returns a cache for a pool of a test.
func newCache(t *testing.T) *cache.Cache {
	t.Helper()
	c, err := cache.New(cache.Options{Bytes: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close the cache: %v", err)
		}
	})
	return c
}

// newPool returns a pool in a new directory. At the end of the test it is
// closed and every image in it must be clean.
func newPool(t *testing.T) *Pool {
	t.Helper()
	return newPoolIn(t, storagetest.MemoryDir(t))
}

func newPoolIn(t *testing.T, dir string) *Pool {
	t.Helper()
	p := openPool(t, dir, Options{Cache: newCache(t)})
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close the pool: %v", err)
		}
		checkImages(t, p.Path())
	})
	return p
}

func openPool(t *testing.T, dir string, o Options) *Pool {
	t.Helper()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p, err := Open(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// checkImages runs qemu-img check over every image of a pool.
func checkImages(t *testing.T, dir string) {
	t.Helper()
	for _, image := range images(t, dir) {
		qemutest.Check(t, image)
	}
}

// checkImagesHere checks every image of a pool with this program.
func checkImagesHere(t *testing.T, dir string) {
	t.Helper()
	for _, image := range images(t, dir) {
		f, err := qcow2.OpenFile(image, qcow2.FileOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		res, err := qcow2.CheckFile(t.Context(), f, qcow2.CheckOptions{})
		if err := errors.Join(err, f.Close()); err != nil || res.Corruptions+res.Leaks+res.CheckErrors > 0 {
			t.Errorf("check %s: %+v, %v", image, res, err)
		}
	}
}

// images returns the images of a pool, views too.
func images(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	for _, pattern := range []string{"volumes/*/disk.qcow2", "volumes/*/views/*.qcow2"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

// create makes a volume of 8 MiB.
func create(t *testing.T, p *Pool, name string, source Source) Volume {
	t.Helper()
	v, err := p.Create(t.Context(), CreateRequest{Name: name, Size: SizeRange{Required: 8 << 20}, Params: DefaultParams(), Source: source})
	if err != nil {
		t.Fatalf("create %q: %v", name, err)
	}
	return v
}

func snapshot(t *testing.T, p *Pool, name, id string) Snapshot {
	t.Helper()
	s, err := p.CreateSnapshot(t.Context(), name, id)
	if err != nil {
		t.Fatalf("snapshot %q: %v", name, err)
	}
	return s
}

// open opens a volume until the end of the test or its Close.
func open(t *testing.T, p *Pool, id string) *Disk {
	t.Helper()
	d, err := p.Open(t.Context(), id)
	if err != nil {
		t.Fatalf("open %s: %v", id, err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// write fills n bytes of a volume at off with b.
func write(t *testing.T, p *Pool, id string, off int64, b byte, n int) {
	t.Helper()
	d := open(t, p, id)
	if _, err := d.Image.WriteAt(bytes.Repeat([]byte{b}, n), off); err != nil {
		t.Fatalf("write %s: %v", id, err)
	}
	if err := d.Close(); err != nil {
		t.Fatalf("close %s: %v", id, err)
	}
}

// wantBytes checks that n bytes of a volume at off are b.
func wantBytes(t *testing.T, p *Pool, id string, off int64, b byte, n int) {
	t.Helper()
	d := open(t, p, id)
	got := make([]byte, n)
	if _, err := d.Image.ReadAt(got, off); err != nil {
		t.Fatalf("read %s: %v", id, err)
	}
	if err := d.Close(); err != nil {
		t.Fatalf("close %s: %v", id, err)
	}
	if bytes.Equal(got, bytes.Repeat([]byte{b}, n)) { // at once: the race detector looks at each access
		return
	}
	for i := range got {
		if got[i] != b {
			t.Fatalf("byte %d of volume %s: got %#x, want %#x", off+int64(i), id, got[i], b)
		}
	}
}

// remove deletes what must exist.
func remove(t *testing.T, p *Pool, ids ...string) {
	t.Helper()
	for _, id := range ids {
		var err error
		if volumeIDPattern.MatchString(id) {
			err = p.Delete(context.Background(), id)
		} else {
			err = p.DeleteSnapshot(context.Background(), id)
		}
		if err != nil {
			t.Fatalf("delete %s: %v", id, err)
		}
	}
}

func reap(t *testing.T, p *Pool) {
	t.Helper()
	if left, err := p.Reap(t.Context()); err != nil || left {
		t.Fatalf("reap: left %v, %v", left, err)
	}
}

// files lists what is in a pool beyond its own files, relative to it. Others may remove some of it meanwhile.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	for _, top := range []string{volumesDir, incomingDir, groupsDir} {
		err := filepath.WalkDir(filepath.Join(dir, top), func(path string, d os.DirEntry, err error) error {
			rel, _ := filepath.Rel(dir, path)
			if rel == top {
				return err
			}
			if !errors.Is(err, os.ErrNotExist) { // the reaper may be at work
				all = append(all, rel)
				return err
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// allocated returns the space that a file takes on the host, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
