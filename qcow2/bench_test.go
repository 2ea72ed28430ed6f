package qcow2_test

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// benchImage opens an image of size bytes in memory, the first written bytes
// of it allocated.
func benchImage(b *testing.B, size, written int64) *qcow2.Image {
	b.Helper()
	path := filepath.Join(scratch(b), "bench.qcow2")
	createFile(b, path, size, qcow2.CreateOptions{})
	im := openPath(b, path, qcow2.Options{})
	b.Cleanup(func() { im.Close() })
	data := fill(1<<20, 1)
	for off := int64(0); off < written; off += int64(len(data)) {
		if _, err := im.WriteAt(data, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := im.Flush(); err != nil {
		b.Fatal(err)
	}
	return im
}

const benchSize = 1 << 30

func BenchmarkReadAt4KRandom(b *testing.B) {
	im := benchImage(b, benchSize, benchSize)
	rng := rand.New(rand.NewPCG(1, 1))
	p := make([]byte, 4096)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := im.ReadAt(p, rng.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteAt4KInPlace(b *testing.B) {
	im := benchImage(b, benchSize, benchSize)
	rng := rand.New(rand.NewPCG(1, 1))
	p := fill(4096, 2)
	b.SetBytes(4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := im.WriteAt(p, rng.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWriteAt4KInPlaceParallel(b *testing.B) {
	im := benchImage(b, benchSize, benchSize)
	b.SetBytes(4096)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		rng := rand.New(rand.NewPCG(rand.Uint64(), 1))
		p := fill(4096, 2)
		for pb.Next() {
			if _, err := im.WriteAt(p, rng.Int64N(benchSize/4096)*4096); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkWriteAt4KAllocating writes 4 KiB into unallocated clusters of 64 KiB.
func BenchmarkWriteAt4KAllocating(b *testing.B) {
	im := benchImage(b, 1<<40, 0)
	p := fill(4096, 2)
	b.SetBytes(4096)
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		if _, err := im.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
		off += 64 << 10
	}
}

func BenchmarkReadAt1MSequential(b *testing.B) {
	im := benchImage(b, benchSize, benchSize)
	p := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		if _, err := im.ReadAt(p, off); err != nil {
			b.Fatal(err)
		}
		off = (off + 1<<20) % benchSize
	}
}

func BenchmarkWriteAt1MSequential(b *testing.B) {
	im := benchImage(b, benchSize, benchSize)
	p := fill(1<<20, 2)
	b.SetBytes(1 << 20)
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		if _, err := im.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
		off = (off + 1<<20) % benchSize
	}
}

// BenchmarkCreateSnapshot takes and deletes a snapshot of an image of 4 GiB
// with clusters of 4 KiB: a million entries.
func BenchmarkCreateSnapshot(b *testing.B) {
	path := filepath.Join(scratch(b), "bench.qcow2")
	createFile(b, path, 4<<30, qcow2.CreateOptions{ClusterSize: 4096, Preallocation: qcow2.PreallocationMetadata})
	im := openPath(b, path, qcow2.Options{})
	b.Cleanup(func() { im.Close() })
	b.ReportAllocs()
	for b.Loop() {
		s, err := im.CreateSnapshot(b.Context(), qcow2.Snapshot{Name: "b"})
		if err != nil {
			b.Fatal(err)
		}
		if err := im.DeleteSnapshot(b.Context(), s.ID); err != nil {
			b.Fatal(err)
		}
	}
}

// TestHotPathsAllocateNothing holds the paths of a guest that reads and writes to
// no allocation in memory.
func TestHotPathsAllocateNothing(t *testing.T) {
	if raceEnabled {
		t.Log("the race detector allocates by itself; only correctness is tested")
	}
	path := filepath.Join(scratch(t), "hot.qcow2")
	createFile(t, path, 1<<30, qcow2.CreateOptions{})
	im := useFile(t, path, qcow2.Options{})
	if _, err := im.WriteAt(fill(8<<20, 1), 0); err != nil {
		t.Fatal(err)
	}
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	n := int64(0)
	for name, f := range map[string]func() error{
		"ReadAt of data":           func() error { _, err := im.ReadAt(p, n%2000*4096); return err },
		"ReadAt of a hole":         func() error { _, err := im.ReadAt(p, 32<<20+n%2000*4096); return err },
		"WriteAt in place":         func() error { _, err := im.WriteAt(p, n%2000*4096); return err },
		"WriteAt of a new cluster": func() error { _, err := im.WriteAt(p, 64<<20+n<<16); return err },
	} {
		got := testing.AllocsPerRun(500, func() {
			n++
			if err := f(); err != nil {
				t.Fatal(err)
			}
		})
		if got != 0 && !raceEnabled {
			t.Errorf("%s: %v allocations, want 0", name, got)
		}
	}
}

// TestFlushCost counts the syncs of a flush: one with nothing dirty, two after
// allocations in a known L2 table, and no more when many flush at once.
func TestFlushCost(t *testing.T) {
	d := newDisk(t, 64<<20, qcow2.CreateOptions{})
	im := useDisk(t, d, qcow2.Options{})
	flush := func(what string, want int) {
		t.Helper()
		d.ResetCounts()
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		if got := d.Count(storagetest.OpSync); got != want {
			t.Errorf("%s: %d syncs, want %d", what, got, want)
		}
	}
	write := func(off int64) {
		t.Helper()
		if _, err := im.WriteAt(fill(4096, 1), off); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	flush("with a new L2 table", 3)
	flush("with nothing dirty", 1)
	write(4096)
	flush("after a write in place", 1)
	for i := range int64(60) { // of the 64 clusters that were taken ahead
		write((2 + i) << 16)
		flush("after an allocation", 1)
	}
	for i := range int64(60) {
		write((100 + i) << 16)
	}
	flush("after refcounts rose", 2)
	if err := im.WriteZeroes(0, 64<<10, false); err != nil {
		t.Fatal(err)
	}
	flush("after zeroes", 1)
	write(0)
	flush("after a zero cluster was written", 2)
	if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	write(2 << 16)
	flush("after a copy of an L2 table and of a cluster", 3)
	write(3 << 16)
	flush("after the copy of a cluster", 2)
	flush("with nothing dirty", 1)
}

// TestFlushesShare lets many clients flush while the first pass waits for its
// first sync: they all share the one pass after it.
func TestFlushesShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(t, 64<<20, qcow2.CreateOptions{})
		im := openDisk(t, d, qcow2.Options{})
		if _, err := im.WriteAt(fill(4096, 1), 0); err != nil {
			t.Fatal(err)
		}
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := im.WriteAt(fill(4096, 1), 1<<20); err != nil {
			t.Fatal(err)
		}
		held := make(chan struct{})
		d.SetHook(func(op storagetest.Op, _ int64) {
			if op == storagetest.OpSync {
				<-held
			}
		})
		d.ResetCounts()
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				if err := im.Flush(); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(held)
		wg.Wait()
		if got := d.Count(storagetest.OpSync); got != 2 {
			t.Errorf("%d syncs, want 2: one of each pass", got)
		}
		if err := im.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestSequentialWritesAreLarge counts the requests to the host file that a
// large write needs.
func TestSequentialWritesAreLarge(t *testing.T) {
	d := newDisk(t, 64<<20, qcow2.CreateOptions{})
	im := useDisk(t, d, qcow2.Options{})
	for _, what := range []string{"allocating", "in place"} {
		d.ResetCounts()
		if _, err := im.WriteAt(fill(1<<20, 1), 0); err != nil {
			t.Fatal(err)
		}
		if got := d.Count(storagetest.OpWrites); got > 2 {
			t.Errorf("1 MiB %s: %d writes to the host, want 1, or 2 with a table", what, got)
		}
	}
	d.ResetCounts()
	readAllOf := make([]byte, 1<<20)
	if _, err := im.ReadAt(readAllOf, 0); err != nil {
		t.Fatal(err)
	}
	if got := d.Count(storagetest.OpRead); got > 2 {
		t.Errorf("1 MiB: %d reads from the host, want 1", got)
	}
}

// TestZeroesNeedNoData counts the bytes that zeroing and small writes of new
// clusters move.
func TestZeroesNeedNoData(t *testing.T) {
	d := newDisk(t, 1<<40, qcow2.CreateOptions{})
	im := useDisk(t, d, qcow2.Options{})
	for _, test := range []struct {
		name string
		max  int64
		run  func() error
	}{
		{"4 KiB into a hole", 4096, func() error { _, err := im.WriteAt(fill(4096, 1), 1<<30+8192); return err }},
		{"zero 1 GiB of holes", 0, func() error { return im.WriteZeroes(2<<30, 1<<30, true) }},
		{"discard the cluster", 0, func() error { return im.Discard(1<<30, 64<<10) }},
	} {
		d.ResetCounts()
		if err := test.run(); err != nil {
			t.Fatal(err)
		}
		if got := d.Bytes(storagetest.OpWrites); got > test.max {
			t.Errorf("%s: %d bytes written, want at most %d", test.name, got, test.max)
		}
	}
}

// TestDirectAligned uses an image through a file that refuses unaligned
// requests, as one opened with O_DIRECT may: the engine's own I/O is aligned.
func TestDirectAligned(t *testing.T) {
	for _, clusterSize := range []int64{4096, 65536, 1 << 20} {
		t.Run(fmt.Sprint(clusterSize), func(t *testing.T) {
			d := newDisk(t, 64<<20, qcow2.CreateOptions{ClusterSize: clusterSize})
			im := useDisk(t, d, qcow2.Options{PassDiscard: true})
			d.SetDirect(4096)
			t.Cleanup(func() { d.SetDirect(0) })
			p := qcow2.GetBuffer(8192)
			defer qcow2.PutBuffer(p)
			copy(p, fill(8192, 3))
			for _, off := range []int64{0, 8192, 3 << 20, 5<<20 + 4096} {
				if _, err := im.WriteAt(p, off); err != nil {
					t.Fatalf("WriteAt(%#x): %v", off, err)
				}
				if _, err := im.ReadAt(p, off); err != nil {
					t.Fatalf("ReadAt(%#x): %v", off, err)
				}
			}
			if err := im.Flush(); err != nil {
				t.Fatalf("Flush: %v", err)
			}
		})
	}
}
