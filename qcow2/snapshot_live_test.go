package qcow2_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A stamper writes one growing number into random sectors of several images,
// one image after the other, and keeps what was acknowledged.
type stamper struct {
	images []*qcow2.Image
	size   int64
	next   atomic.Uint64     // the last number that was issued
	acked  [][]atomic.Uint64 // by image and sector: the last number that was acknowledged
}

const stampSector = 512 // bytes

func newStamper(size int64, images ...*qcow2.Image) *stamper {
	s := &stamper{images: images, size: size}
	for range images {
		s.acked = append(s.acked, make([]atomic.Uint64, size/stampSector))
	}
	return s
}

// run writes to its share of the sectors until stop is closed.
func (s *stamper) run(t *testing.T, share, shares int, stop <-chan struct{}) {
	r := newRand(t)
	buf := make([]byte, 64*stampSector)
	per := int(s.size/stampSector) / shares
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		k := i % len(s.images)
		n := 1 + r.IntN(64)
		sector := share*per + r.IntN(per-n)
		number := s.next.Add(1)
		for j := range n {
			binary.BigEndian.PutUint64(buf[j*stampSector:], number)
		}
		off := int64(sector) * stampSector
		if _, err := s.images[k].WriteAt(buf[:n*stampSector], off); err != nil {
			t.Error(err)
			return
		}
		for j := range n {
			s.acked[k][sector+j].Store(number)
		}
	}
}

// during runs f while writers run.
func (s *stamper) during(t *testing.T, f func()) {
	const writers = 3
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() { s.run(t, w, writers, stop) })
	}
	f()
	close(stop)
	wg.Wait()
}

// A taken is a snapshot of one image with what must be in it.
type taken struct {
	id     string
	before []uint64 // by sector: acknowledged before the call
	last   uint64   // the last number issued before it returned
}

func (s *stamper) ackedNow(image int) []uint64 {
	now := make([]uint64, len(s.acked[image]))
	for i := range now {
		now[i] = s.acked[image][i].Load()
	}
	return now
}

// check reads the snapshot from path and returns its sectors.
func (c *taken) check(t *testing.T, path string) []uint64 {
	t.Helper()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), f, qcow2.Options{ReadOnly: true, Snapshot: c.id})
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	content := make([]byte, im.Size())
	if _, err := im.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	stamps := make([]uint64, len(c.before))
	for i := range stamps {
		stamps[i] = binary.BigEndian.Uint64(content[i*stampSector:])
		if stamps[i] < c.before[i] || stamps[i] > c.last {
			t.Fatalf("%s, snapshot %s, sector %d: number %d, want one of [%d, %d]",
				filepath.Base(path), c.id, i, stamps[i], c.before[i], c.last)
		}
	}
	return stamps
}

// newLiveImage makes an image file and opens it.
func newLiveImage(t *testing.T, path string, size, clusterSize int64) *qcow2.Image {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(t.Context(), f, size, qcow2.CreateOptions{ClusterSize: clusterSize}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), f, qcow2.Options{PassDiscard: true})
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// Snapshots that are taken and deleted under writers hold what was acknowledged
// before the call and nothing that was issued after it (P4).
func TestSnapshotUnderWriters(t *testing.T) {
	for _, clusterSize := range []int64{512, 4 << 10, 64 << 10} {
		t.Run(fmt.Sprint(clusterSize), func(t *testing.T) {
			const size = 8 << 20
			path := filepath.Join(scratch(t), "live.qcow2")
			im := newLiveImage(t, path, size, clusterSize)
			s := newStamper(size, im)
			var kept []taken
			s.during(t, func() {
				for i := range 9 {
					before := s.ackedNow(0)
					snap, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: fmt.Sprint("s", i)})
					if err != nil {
						t.Error(err)
						return
					}
					kept = append(kept, taken{snap.ID, before, s.next.Load()})
					if i%2 == 1 {
						if err := im.DeleteSnapshot(t.Context(), kept[i/4].id); err != nil {
							t.Error(err)
							return
						}
						kept = append(kept[:i/4], kept[i/4+1:]...)
					}
				}
			})
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			qemutest.Check(t, path)
			for _, c := range kept {
				c.check(t, path)
			}
		})
	}
}

// The snapshots of a group are one point in time: each writer numbers its writes
// and alternates between the images, so no image may hold a later number of a
// writer while another misses an earlier one.
func TestGroupSnapshotIsOnePointInTime(t *testing.T) {
	const size, groups = 4 << 20, 6
	dir := scratch(t)
	paths := []string{filepath.Join(dir, "a.qcow2"), filepath.Join(dir, "b.qcow2"), filepath.Join(dir, "c.qcow2")}
	var images []*qcow2.Image
	for _, p := range paths {
		images = append(images, newLiveImage(t, p, size, 4<<10))
	}
	var ids [][]string
	stop := make(chan struct{})
	var wg sync.WaitGroup
	// One writer: number n goes to sector n of image n%3, each after the one before.
	// It has an equal share of the sectors for each group, however long those take.
	const share = uint64(size) * 3 / stampSector / groups
	var issued, allowed atomic.Uint64
	wg.Go(func() {
		buf := make([]byte, stampSector)
		for n := uint64(1); n < share*groups; n++ {
			for n >= allowed.Load() {
				select {
				case <-stop:
					return
				default:
					runtime.Gosched()
				}
			}
			binary.BigEndian.PutUint64(buf, n)
			k := n % uint64(len(images))
			if _, err := images[k].WriteAt(buf, int64(n)/int64(len(images))*stampSector); err != nil {
				t.Error(err)
				return
			}
			issued.Store(n)
		}
	})
	for g := range groups {
		allowed.Add(share)
		for before := issued.Load(); issued.Load() < before+200 && !t.Failed(); { // let it write between groups
			runtime.Gosched()
		}
		var requests []qcow2.SnapshotRequest
		for _, im := range images {
			requests = append(requests, qcow2.SnapshotRequest{Image: im, Snapshot: qcow2.Snapshot{Name: fmt.Sprint("g", g)}})
		}
		snaps, err := qcow2.CreateSnapshots(t.Context(), requests)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, []string{snaps[0].ID, snaps[1].ID, snaps[2].ID})
	}
	close(stop)
	wg.Wait()
	for i, im := range images {
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
		qemutest.Check(t, paths[i])
	}
	for g := range ids {
		there := make(map[uint64]bool)
		last := uint64(0)
		for i, p := range paths {
			c := taken{id: ids[g][i], before: make([]uint64, size/stampSector), last: issued.Load() + 1}
			for _, n := range c.check(t, p) {
				if n != 0 {
					there[n] = true
					last = max(last, n)
				}
			}
		}
		if uint64(len(there)) != last {
			t.Fatalf("group %d holds number %d, but only %d numbers: some earlier write is missing", g, last, len(there))
		}
	}
}

// A group in which the last image finds no space leaves no snapshot on any, and
// nothing to repair.
func TestGroupSnapshotIsAllOrNothing(t *testing.T) {
	const size = 1 << 20
	disk := storagetest.NewDisk()
	if err := qcow2.Create(t.Context(), disk, size, qcow2.CreateOptions{ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	bad, err := qcow2.Open(t.Context(), disk, qcow2.Options{})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(scratch(t), "good.qcow2")
	good := newLiveImage(t, path, size, 4096)
	images := []*qcow2.Image{good, bad}
	for _, im := range images {
		if _, err := im.WriteAt(make([]byte, size/2), 0); err != nil {
			t.Fatal(err)
		}
	}
	fault := &storagetest.Fault{Ops: storagetest.OpAllocate, N: 1, Err: syscall.ENOSPC}
	disk.Inject(fault)
	_, err = qcow2.CreateSnapshots(t.Context(), []qcow2.SnapshotRequest{{Image: good}, {Image: bad}})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("got %v, want no space left", err)
	}
	for i, im := range images {
		if n := len(im.Snapshots()); n != 0 {
			t.Errorf("image %d has %d snapshots, want 0", i, n)
		}
		if im.Info().Dirty {
			t.Errorf("image %d is dirty", i)
		}
		r, err := im.Check(t.Context(), qcow2.CheckOptions{})
		if err != nil || !r.Clean() {
			t.Errorf("image %d: %+v, %v", i, r, err)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	}
	qemutest.Check(t, path)
}

// TestReadWhileApplied reads the end of a disk that becomes shorter and longer
// meanwhile: a read sees it, or is out of range.
func TestReadWhileApplied(t *testing.T) {
	const small, large = 1 << 20, 64 << 20
	d := newDisk(t, small, qcow2.CreateOptions{ClusterSize: 4096})
	im := useDisk(t, d, qcow2.Options{})
	var ids [2]string
	for i := range ids {
		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = s.ID
		if err := im.Resize(t.Context(), large); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var readers sync.WaitGroup
	for range 2 {
		readers.Go(func() { // ends when stop is closed
			p := make([]byte, 4096)
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := im.ReadAt(p, large-4096); err != nil && !errors.Is(err, qcow2.ErrOutOfRange) {
					t.Errorf("ReadAt: %v", err)
				}
				if _, err := im.BlockStatus(t.Context(), large-4096, 4096); err != nil && !errors.Is(err, qcow2.ErrOutOfRange) {
					t.Errorf("BlockStatus: %v", err)
				}
			}
		})
	}
	for i := range 400 {
		if err := im.ApplySnapshot(t.Context(), ids[i%2]); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	readers.Wait()
}
