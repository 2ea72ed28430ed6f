package volume

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A node is a pool in a directory, and the arena of the process that has it open.
type node struct {
	t     *testing.T
	dir   string
	cache *cache.Cache
	pool  *Pool
}

// startNode starts a process over what lies in dir: a pool, or nothing.
func startNode(t *testing.T, dir string, o Options) *node {
	t.Helper()
	pool, arena := recoverPaths(dir)
	c, err := cache.New(cache.Options{Bytes: 1 << 20, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	o.Cache = c
	if err := os.MkdirAll(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	n := &node{t, dir, c, openPool(t, pool, o)}
	t.Cleanup(func() {
		if err := errors.Join(n.pool.Close(), c.Close()); err != nil && !errors.Is(err, qcow2.ErrFailed) {
			t.Error(err)
		}
	})
	return n
}

// killed returns a directory with what a SIGKILL leaves of n.
func (n *node) killed() string {
	n.t.Helper()
	dir := filepath.Join(storagetest.MemoryDir(n.t), "node")
	copyTree(n.t, n.dir, dir)
	return dir
}

func (n *node) open(id string) *Disk {
	n.t.Helper()
	d, err := n.pool.Open(n.t.Context(), id)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { d.Close() })
	return d
}

func content(t *testing.T, d *Disk, off int64) byte {
	t.Helper()
	p := make([]byte, 256<<10)
	if _, err := d.Image.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, bytes.Repeat(p[:1], len(p))) {
		t.Error("the content is torn")
	}
	return p[0]
}

func fillWith(t *testing.T, d *Disk, b byte, off int64) {
	t.Helper()
	if _, err := d.Image.WriteAt(bytes.Repeat([]byte{b}, 256<<10), off); err != nil {
		t.Fatal(err)
	}
}

// TestStaleArenaIsNotUsed kills the node, lets another one take the pool over
// without the arena, write and be killed too, and starts the first again: what
// its arena has is older than the image (rule A6).
func TestStaleArenaIsNotUsed(t *testing.T) {
	first := startNode(t, storagetest.MemoryDir(t), Options{})
	v := create(t, first.pool, "pvc", Source{})
	fillWith(t, first.open(v.ID), 1, 0)
	_, oldArena := recoverPaths(first.killed())

	second := first.killed()
	_, arena := recoverPaths(second)
	if err := os.Remove(arena); err != nil {
		t.Fatal(err)
	}
	other := startNode(t, second, Options{})
	d := other.open(v.ID)
	fillWith(t, d, 2, 0)
	fillWith(t, d, 3, 4<<20) // in clusters of which the first node does not know
	if err := d.Image.Flush(); err != nil {
		t.Fatal(err)
	}

	last := other.killed()
	_, arena = recoverPaths(last)
	if err := os.Rename(oldArena, arena); err != nil {
		t.Fatal(err)
	}
	again := startNode(t, last, Options{})
	if n := len(again.cache.Unclaimed()); n != 1 {
		t.Fatalf("%d images wait in the old arena, want 1", n)
	}
	again.pool.Recover(t.Context())
	d = again.open(v.ID)
	if a, b := content(t, d, 0), content(t, d, 4<<20); a != 2 || b != 3 {
		t.Errorf("the volume holds %d and %d, want 2 and 3", a, b)
	}
	for _, u := range again.cache.Unclaimed() {
		if again.pool.Owns(u.ID) {
			t.Error("the pool owns tables that are not for it")
		}
		if err := again.cache.Forget(u.ID); err != nil {
			t.Error(err)
		}
	}
}

// A brokenFile fails its syncs once it is told to.
type brokenFile struct {
	qcow2.File
	broken *atomic.Bool
}

func (f brokenFile) Datasync() error {
	if f.broken.Load() {
		return syscall.EIO
	}
	return f.File.Datasync()
}

// TestFailureAfterKill fails a sync and kills the node. Whoever takes the volume
// over for its clients has it failed; once nobody has, it is verified and works.
func TestFailureAfterKill(t *testing.T) {
	var broken atomic.Bool
	n := startNode(t, storagetest.MemoryDir(t), Options{wrapFile: func(f qcow2.File) qcow2.File { return brokenFile{f, &broken} }})
	v := create(t, n.pool, "pvc", Source{})
	d := n.open(v.ID)
	fillWith(t, d, 1, 0)
	if err := d.Image.Flush(); err != nil {
		t.Fatal(err)
	}
	fillWith(t, d, 2, 0)
	broken.Store(true)
	if err := d.Image.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("Flush: %v, want EIO", err)
	}
	for _, takenOver := range []bool{true, false} {
		next := startNode(t, n.killed(), Options{})
		if takenOver {
			d := next.open(v.ID)
			next.pool.Recover(t.Context()) // finds it in use
			if err := d.Image.Flush(); !errors.Is(err, qcow2.ErrFailed) {
				t.Errorf("Flush after the takeover: %v, want ErrFailed", err)
			}
			if problem, _ := next.pool.Health(v.ID); !errors.Is(problem, qcow2.ErrFailed) {
				t.Errorf("health: %v, want ErrFailed", problem)
			}
			if err := d.Close(); !errors.Is(err, qcow2.ErrFailed) {
				t.Errorf("Close: %v, want ErrFailed", err)
			}
		} else {
			next.pool.Recover(t.Context())
		}
		d := next.open(v.ID)
		fillWith(t, d, 3, 0)
		if err := d.Image.Flush(); err != nil {
			t.Errorf("taken over %v: Flush after all was closed: %v", takenOver, err)
		}
	}
}
