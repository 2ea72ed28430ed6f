package powerloss

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
)

// A machine mounts simulated disks, one at a time, always at the same place: the
// names in a pool are absolute.
type machine struct {
	t        *testing.T
	attacher *nbdexport.Attacher
	pool     string // mount point
	fstype   string
}

func newMachine(t *testing.T, fstype string) *machine {
	t.Helper()
	a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return &machine{t: t, attacher: a, pool: t.TempDir(), fstype: fstype}
}

// newDisk returns a disk with a new filesystem.
func (m *machine) newDisk() *storagetest.Disk {
	m.t.Helper()
	sizes := map[string]int64{"ext4": 96 << 20, "xfs": 320 << 20}
	file := filepath.Join(m.t.TempDir(), "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Truncate(file, sizes[m.fstype]); err != nil {
		m.t.Fatal(err)
	}
	if out, err := exec.CommandContext(m.t.Context(), "mkfs."+m.fstype, "-q", file).CombinedOutput(); err != nil {
		m.t.Fatalf("mkfs.%s: %v\n%s", m.fstype, err, out)
	}
	disk, err := storagetest.LoadDisk(file)
	if err != nil {
		m.t.Fatal(err)
	}
	return disk
}

// with runs f while the disk's filesystem is mounted.
func (m *machine) with(disk *storagetest.Disk, f func()) {
	t := m.t
	t.Helper()
	raw, err := qcow2.OpenRaw(disk, qcow2.RawOptions{})
	if err != nil {
		t.Fatal(err)
	}
	dev, err := m.attacher.Attach(t.Context(), imagebackend.New(raw, imagebackend.Options{}), nbdexport.DeviceOptions{ID: "disk"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := dev.Detach(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Mount(dev.Path(), m.pool, m.fstype, 0, ""); err != nil {
		t.Fatalf("mount: %v", err)
	}
	defer func() {
		if err := unix.Unmount(m.pool, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(m.pool, unix.MNT_DETACH)
		}
	}()
	f()
}

// A cutter takes what power losses would leave of a disk while it is used.
type cutter struct {
	disk  *storagetest.Disk
	rng   *rand.Rand
	acked atomic.Int64 // steps
	odds  int          // one write or sync of odds is cut
	cuts  []cut        // made by the goroutines that serve the device, one at a time: see hook
	held  chan struct{}
}

// A cut is a disk after a power loss.
type cut struct {
	acked int // steps that were acknowledged before
	disk  *storagetest.Disk
}

func newCutter(disk *storagetest.Disk, rng *rand.Rand, odds int) *cutter {
	c := &cutter{disk: disk, rng: rng, odds: odds, held: make(chan struct{}, 1)}
	disk.RecordTail()
	disk.SetHook(func(op storagetest.Op, _ int64) {
		if op != storagetest.OpRead {
			c.hook()
		}
	})
	return c
}

// hook cuts now and then.
func (c *cutter) hook() {
	c.held <- struct{}{}
	defer func() { <-c.held }()
	if c.rng.IntN(c.odds) == 0 {
		c.cutLocked()
	}
}

// acknowledge counts a step, and cuts right after it.
func (c *cutter) acknowledge() {
	c.held <- struct{}{}
	defer func() { <-c.held }()
	c.acked.Add(1)
	for range 3 {
		c.cutLocked()
	}
}

func (c *cutter) cutLocked() {
	// The count is read first: a step that is acknowledged meanwhile may be
	// missing from the disk.
	acked := int(c.acked.Load())
	c.cuts = append(c.cuts, cut{acked, c.disk.CrashClone(c.rng)})
}

// stop ends the cutting and returns the cuts.
func (c *cutter) stop() []cut {
	c.disk.SetHook(nil)
	c.held <- struct{}{}
	return c.cuts
}
