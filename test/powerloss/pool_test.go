package powerloss

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

var (
	seed = flag.Uint64("seed", 0, "of the random choices; 0 takes the time")
	odds = flag.Int("odds", 40, "the power is cut at one write or sync of the disk in so many")
)

// A step is an operation of the pool that can be repeated.
type step struct {
	name string
	run  func(context.Context, *volume.Pool) error
	// holds returns an error unless the effect of the step is there.
	holds func(context.Context, *volume.Pool) error
	// until, if not "", names the step that takes the effect away.
	until string
}

func volumeID(p *volume.Pool, name string) (string, error) {
	id, exists := p.VolumeNamed(name)
	if !exists {
		return "", fmt.Errorf("%w: volume named %q", volume.ErrNotFound, name)
	}
	return id, nil
}

func createVolume(name string, size int64, source func(*volume.Pool) volume.Source) func(context.Context, *volume.Pool) error {
	return func(ctx context.Context, p *volume.Pool) error {
		req := volume.CreateRequest{Name: name, Size: volume.SizeRange{Required: size}, Params: volume.DefaultParams()}
		if source != nil {
			req.Source = source(p)
		}
		_, err := p.Create(ctx, req)
		return err
	}
}

func exists(name string) func(context.Context, *volume.Pool) error {
	return func(_ context.Context, p *volume.Pool) error {
		id, err := volumeID(p, name)
		if err == nil {
			_, err = p.Get(id)
		}
		return err
	}
}

func missing(name string) func(context.Context, *volume.Pool) error {
	return func(ctx context.Context, p *volume.Pool) error {
		if err := exists(name)(ctx, p); !errors.Is(err, volume.ErrNotFound) {
			return fmt.Errorf("volume %q is back: %v", name, err)
		}
		return nil
	}
}

// pattern is what write writes.
func pattern(b byte) []byte { return bytes.Repeat([]byte{b}, 300<<10) }

func write(name string, off int64, b byte) func(context.Context, *volume.Pool) error {
	return withDisk(name, func(im *qcow2.Image) error {
		if _, err := im.WriteAt(pattern(b), off); err != nil {
			return err
		}
		return im.Flush()
	})
}

func reads(name string, off int64, b byte) func(context.Context, *volume.Pool) error {
	return withDisk(name, func(im *qcow2.Image) error {
		got := make([]byte, len(pattern(b)))
		if _, err := im.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, pattern(b)) {
			return fmt.Errorf("volume %q does not hold %#x at %#x", name, b, off)
		}
		return nil
	})
}

func withDisk(name string, f func(*qcow2.Image) error) func(context.Context, *volume.Pool) error {
	return func(ctx context.Context, p *volume.Pool) error {
		id, err := volumeID(p, name)
		if err != nil {
			return err
		}
		d, err := p.Open(ctx, id)
		if err != nil {
			return err
		}
		return errors.Join(f(d.Image), d.Close())
	}
}

func deleted(err error) error {
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	return err
}

// steps are a life of a pool.
var steps = []step{
	{name: "create a", run: createVolume("a", 4<<20, nil), holds: exists("a")},
	{name: "write a", run: write("a", 0, 1), holds: reads("a", 0, 1), until: "overwrite a"},
	{name: "create b", run: createVolume("b", 2<<20, nil), holds: exists("b"), until: "delete b"},
	{name: "snapshot a", run: func(ctx context.Context, p *volume.Pool) error {
		id, err := volumeID(p, "a")
		if err == nil {
			_, err = p.CreateSnapshot(ctx, "s", id)
		}
		return err
	}, holds: func(_ context.Context, p *volume.Pool) error {
		if _, exists := p.SnapshotNamed("s"); !exists {
			return errors.New("the snapshot is lost")
		}
		return nil
	}, until: "delete the snapshot"},
	{name: "overwrite a", run: write("a", 0, 2), holds: reads("a", 0, 2)},
	{name: "restore", run: createVolume("r", 8<<20, func(p *volume.Pool) volume.Source {
		id, _ := p.SnapshotNamed("s")
		return volume.Source{Snapshot: id}
	}), holds: reads("r", 0, 1)},
	{name: "delete b", run: func(ctx context.Context, p *volume.Pool) error {
		id, err := volumeID(p, "b")
		if err == nil {
			err = p.Delete(ctx, id)
		}
		return deleted(err)
	}, holds: missing("b")},
	{name: "write r", run: write("r", 5<<20, 3), holds: reads("r", 5<<20, 3)},
	{name: "clone", run: createVolume("c", 0, func(p *volume.Pool) volume.Source {
		id, _ := p.VolumeNamed("r")
		return volume.Source{Volume: id}
	}), holds: reads("c", 5<<20, 3)},
	{name: "expand a", run: func(ctx context.Context, p *volume.Pool) error {
		id, err := volumeID(p, "a")
		if err == nil {
			_, err = p.Expand(ctx, id, volume.SizeRange{Required: 16 << 20})
		}
		return err
	}, holds: withDisk("a", func(im *qcow2.Image) error {
		if im.Size() != 16<<20 {
			return fmt.Errorf("size %d", im.Size())
		}
		return nil
	})},
	{name: "write the end of a", run: write("a", 15<<20, 4), holds: reads("a", 15<<20, 4)},
	{name: "delete the snapshot", run: func(ctx context.Context, p *volume.Pool) error {
		id, exists := p.SnapshotNamed("s")
		if !exists {
			return nil
		}
		return deleted(p.DeleteSnapshot(ctx, id))
	}, holds: func(_ context.Context, p *volume.Pool) error {
		if _, exists := p.SnapshotNamed("s"); exists {
			return errors.New("the snapshot is back")
		}
		return nil
	}},
}

// expired reports whether step i may have lost its effect when acked steps were
// acknowledged and one more was perhaps under way.
func expired(i, acked int) bool {
	for j, s := range steps {
		if s.name == steps[i].until {
			return j <= acked
		}
	}
	return false
}

func openPool(t *testing.T, dir string) (*volume.Pool, *cache.Cache) {
	t.Helper()
	c, err := cache.New(cache.Options{Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	p, err := volume.Open(t.Context(), dir, volume.Options{Cache: c})
	if err != nil {
		t.Fatalf("open the pool: %v", err)
	}
	return p, c
}

func closePool(t *testing.T, p *volume.Pool, c *cache.Cache) {
	t.Helper()
	if err := errors.Join(p.Close(), c.Close()); err != nil {
		t.Error(err)
	}
}

// TestPoolOutlivesPowerLoss cuts the power after every step, and at random
// moments of every step. After the next start each acknowledged step has its effect,
// the one under way can be repeated, and every image is clean.
func TestPoolOutlivesPowerLoss(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			s := *seed
			if s == 0 {
				s = uint64(time.Now().UnixNano())
			}
			t.Logf("-seed %d", s)
			rng := rand.New(rand.NewPCG(s, 0))
			m := newMachine(t, fstype)
			disk := m.newDisk()
			m.with(disk, func() { // the pool is there before the first cut
				p, c := openPool(t, m.pool)
				closePool(t, p, c)
			})
			var cuts []cut
			c := newCutter(disk, rng, *odds)
			m.with(disk, func() {
				p, tables := openPool(t, m.pool)
				for _, s := range steps {
					if err := s.run(t.Context(), p); err != nil {
						t.Fatalf("%s: %v", s.name, err)
					}
					c.acknowledge()
				}
				cuts = c.stop()
				closePool(t, p, tables)
			})
			for i, cut := range cuts {
				m.with(cut.disk, func() { afterPowerLoss(t, m.pool, cut.acked) })
				if t.Failed() {
					t.Fatalf("cut %d, after %d steps", i, cut.acked)
				}
			}
			t.Logf("%d power losses, nothing acknowledged is lost", len(cuts))
		})
	}
}

// afterPowerLoss starts the pool and looks for the effects of the steps.
func afterPowerLoss(t *testing.T, dir string, acked int) {
	ctx := t.Context()
	p, c := openPool(t, dir)
	p.Recover(ctx)
	checkImages(t, dir) // what was lost of the space is back
	for i, s := range steps[:acked] {
		if expired(i, acked) {
			continue
		}
		if err := s.holds(ctx, p); err != nil {
			t.Errorf("%s: was acknowledged, and then: %v", s.name, err)
		}
	}
	if acked < len(steps) {
		next := steps[acked]
		if err := next.run(ctx, p); err != nil {
			t.Errorf("%s, again: %v", next.name, err)
		} else if err := next.holds(ctx, p); err != nil {
			t.Errorf("%s, again: %v", next.name, err)
		}
	}
	closePool(t, p, c)
	checkImages(t, dir)
}

// checkImages has QEMU check every image of the pool.
func checkImages(t *testing.T, dir string) {
	t.Helper()
	for _, pattern := range []string{"volumes/*/disk.qcow2", "volumes/*/views/*.qcow2"} {
		images, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, image := range images {
			qemutest.Check(t, image)
		}
	}
}
