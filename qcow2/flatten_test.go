package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A flattenCase is an image over a backing file with every kind of content.
type flattenCase struct {
	base, disk *storagetest.Disk
	im         *qcow2.Image
	content    []byte // of the guest
}

// openBase is a BackingOpener that knows one image.
func openBase(base *storagetest.Disk) qcow2.BackingOpener {
	return func(ctx context.Context, _, _ string) (qcow2.Disk, error) {
		return qcow2.Open(ctx, base.Clone(), qcow2.Options{ReadOnly: true})
	}
}

// newFlattenCase makes an overlay of size bytes over a backing file of baseSize
// bytes in clusters of half the size.
func newFlattenCase(t *testing.T, r *rand.Rand, size, baseSize int64, o qcow2.CreateOptions) *flattenCase {
	t.Helper()
	c := &flattenCase{base: storagetest.NewDisk(), disk: storagetest.NewDisk(), content: make([]byte, size)}
	cluster := max(o.ClusterSize/2, 512)
	if err := qcow2.Create(t.Context(), c.base, baseSize, qcow2.CreateOptions{ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	base := openDisk(t, c.base, qcow2.Options{})
	for off := int64(0); off < baseSize; off += cluster {
		n := min(cluster, baseSize-off)
		switch r.IntN(4) {
		case 0: // nothing
		case 1: // zeroes that are allocated
			if _, err := base.WriteAt(make([]byte, n), off); err != nil {
				t.Fatal(err)
			}
		default:
			copy(c.content[off:off+n], fill(n, uint64(1+r.IntN(200))))
			if _, err := base.WriteAt(c.content[off:off+n], off); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustClose(t, base)
	o.BackingFile, o.BackingFormat = "base", "qcow2"
	if err := qcow2.Create(t.Context(), c.disk, size, o); err != nil {
		t.Fatal(err)
	}
	c.im = openDisk(t, c.disk, c.options())
	return c
}

func (c *flattenCase) options() qcow2.Options { return qcow2.Options{OpenBacking: openBase(c.base)} }

// flatten populates the whole image in steps of limit bytes.
func flatten(t *testing.T, im *qcow2.Image, limit int64) {
	t.Helper()
	for off := int64(0); off < im.Size(); {
		next, _, err := im.Populate(t.Context(), off, limit)
		if err != nil {
			t.Fatal(err)
		}
		if next <= off {
			t.Fatalf("Populate(%#x) went on to %#x", off, next)
		}
		off = next
	}
}

func wantDropped(t *testing.T, im *qcow2.Image, want bool) {
	t.Helper()
	got, err := im.DropBacking(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Fatalf("DropBacking: got %v, want %v", got, want)
	}
	if has := im.Info().BackingFile != ""; has == want {
		t.Errorf("the header names a backing file: got %v, want %v", has, !want)
	}
}

func wantGuest(t *testing.T, im *qcow2.Image, want []byte) {
	t.Helper()
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("byte %#x: got %#x, want %#x", i, got[i], want[i])
	}
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

var flattenGeometries = []struct {
	name           string
	size, baseSize int64
	create         qcow2.CreateOptions
}{
	{"4k", 640 << 10, 640 << 10, qcow2.CreateOptions{ClusterSize: 4096}},
	{"512 larger", 128<<10 + 512, 70<<10 + 512, qcow2.CreateOptions{ClusterSize: 512}},
	{"64k smaller base", 1<<20 + 512, 300<<10 + 512, qcow2.CreateOptions{ClusterSize: 64 << 10}},
	{"v2", 200 << 10, 100<<10 + 512, qcow2.CreateOptions{ClusterSize: 1024, Version: 2}},
}

// A flattened image reads as before, needs its backing file no more, and is sound.
func TestFlatten(t *testing.T) {
	for _, g := range flattenGeometries {
		t.Run(g.name, func(t *testing.T) {
			c := newFlattenCase(t, newRand(t), g.size, g.baseSize, g.create)
			wantGuest(t, c.im, c.content)
			wantDropped(t, c.im, false)
			flatten(t, c.im, 16<<10)
			wantGuest(t, c.im, c.content)
			if _, copied, err := c.im.Populate(t.Context(), 0, c.im.Size()); err != nil || copied != 0 {
				t.Errorf("a second time: copied %d bytes, %v", copied, err)
			}
			wantDropped(t, c.im, true)
			wantGuest(t, c.im, c.content)
			mustClose(t, c.im)
			c.disk.Reopen()
			im := openDisk(t, c.disk, qcow2.Options{}) // no backing file may be opened
			wantGuest(t, im, c.content)
			mustClose(t, im)
			path := scratch(t) + "/flat.qcow2"
			if err := c.disk.Dump(path); err != nil {
				t.Fatal(err)
			}
			qemutest.Check(t, path)
		})
	}
}

// A snapshot that shows the backing file keeps it; one that was taken of a
// populated image does not.
func TestFlattenWithSnapshots(t *testing.T) {
	c := newFlattenCase(t, newRand(t), 640<<10, 640<<10, qcow2.CreateOptions{ClusterSize: 4096})
	if _, _, err := c.im.Populate(t.Context(), 0, 100<<10); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"early", "late"} {
		if _, err := c.im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: name}); err != nil {
			t.Fatal(err)
		}
		flatten(t, c.im, 1<<20)
	}
	wantGuest(t, c.im, c.content)
	wantDropped(t, c.im, false)
	if err := c.im.DeleteSnapshot(t.Context(), "early"); err != nil {
		t.Fatal(err)
	}
	wantDropped(t, c.im, true)
	if err := c.im.ApplySnapshot(t.Context(), "late"); err != nil {
		t.Fatal(err)
	}
	wantGuest(t, c.im, c.content)
	mustClose(t, c.im)
}

// Guests that write, discard and read while the image is flattened and loses its
// backing file see what they wrote and nothing else.
func TestFlattenUnderGuests(t *testing.T) {
	const guests = 4
	r := newRand(t)
	for range 8 {
		c := newFlattenCase(t, r, 1<<20, 1<<20, qcow2.CreateOptions{ClusterSize: 4096})
		share := int(c.im.Size()) / guests
		seeds := [guests]uint64{r.Uint64(), r.Uint64(), r.Uint64(), r.Uint64()}
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for g := range guests {
			wg.Go(func() {
				c.guest(t, rand.New(rand.NewPCG(seeds[g], 0)), g*share, share, stop)
			})
		}
		flatten(t, c.im, 8<<10)
		if _, err := c.im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "on the way"}); err != nil {
			t.Error(err)
		}
		wantDropped(t, c.im, true)
		close(stop)
		wg.Wait()
		wantGuest(t, c.im, c.content)
		mustClose(t, c.im)
		c.disk.Reopen()
		im := openDisk(t, c.disk, qcow2.Options{})
		wantGuest(t, im, c.content)
		mustClose(t, im)
		if t.Failed() {
			return
		}
	}
}

// guest changes and reads its own share of the disk until stop is closed.
func (c *flattenCase) guest(t *testing.T, r *rand.Rand, start, share int, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		n := 512 * (1 + r.IntN(24))
		off := start + 512*r.IntN((share-n)/512)
		mine := c.content[off : off+n]
		var err error
		switch r.IntN(4) {
		case 0:
			copy(mine, fill(int64(n), uint64(r.IntN(250)+1)))
			_, err = c.im.WriteAt(mine, int64(off))
		case 1:
			clear(mine)
			err = c.im.WriteZeroes(int64(off), int64(n), r.IntN(2) == 0)
		default:
			got := make([]byte, n)
			if _, err = c.im.ReadAt(got, int64(off)); err == nil && !bytes.Equal(got, mine) {
				err = fmt.Errorf("read [%#x, +%d): byte %d differs", off, n, firstDifference(got, mine))
			}
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

// Flattening changes nothing that a guest sees, so whatever a power loss leaves
// of it reads the same, with the backing file that its header names or without.
func TestFlattenPowerLoss(t *testing.T) {
	r := newRand(t)
	states, without := 0, 0
	for _, g := range flattenGeometries {
		c := newFlattenCase(t, r, g.size, g.baseSize, g.create)
		log := c.disk.Record()
		half := c.im.Size() / 2
		if _, _, err := c.im.Populate(t.Context(), 0, half); err != nil {
			t.Fatal(err)
		}
		if err := c.im.Flush(); err != nil {
			t.Fatal(err)
		}
		flatten(t, c.im, 64<<10)
		wantDropped(t, c.im, true)
		mustClose(t, c.im)
		pick, total := rand.New(rand.NewPCG(r.Uint64(), 0)), 0
		seed := r.Uint64()
		for range log.States(rand.New(rand.NewPCG(seed, 0)), 4) {
			total++
		}
		for s := range log.States(rand.New(rand.NewPCG(seed, 0)), 4) {
			if pick.IntN(total) >= scaled(300) {
				continue
			}
			states++
			o := c.options()
			o.Unclean = true
			im, err := qcow2.Open(t.Context(), s.Disk(), o)
			if err != nil {
				t.Fatalf("%s: power loss after event %d (%s): %v", g.name, s.At, s.What, err)
			}
			if im.Info().BackingFile == "" {
				without++
			}
			wantGuest(t, im, c.content)
			res, err := im.Check(t.Context(), qcow2.CheckOptions{})
			if err != nil || res.Corruptions+res.CheckErrors > 0 {
				t.Fatalf("%s: power loss after event %d (%s): %+v, %v", g.name, s.At, s.What, res, err)
			}
			mustClose(t, im)
		}
	}
	t.Logf("%d states, %d of them without a backing file", states, without)
	if without == 0 || without == states {
		t.Errorf("of %d states %d are without a backing file: want some and not all", states, without)
	}
}
