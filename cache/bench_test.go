package cache

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchSlots are the sizes of the cache in the benchmarks: what an operation
// costs must not depend on them.
var benchSlots = []int{16, 256, 4096, 65536, 1_000_000}

// Benchmarks without "Spread" in their name use two sets, whatever the size of
// the cache, so that what differs is the work and not how far away the memory is. Those
// with it use all of the cache: what they add with the size is the processor's
// cache and TLB misses.

// zeroFile is a File of zeroes that forgets what is written.
type zeroFile struct{}

func (zeroFile) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (zeroFile) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (zeroFile) Datasync() error                          { return nil }

// benchSizes runs body over sizes of the cache and numbers of goroutines;
// setup prepares the handle and returns one goroutine's work of n operations.
func benchSizes(b *testing.B, setup func(b *testing.B, h *Handle, slots int) func(g, n int)) {
	for _, slots := range benchSlots {
		b.Run(fmt.Sprintf("slots=%d", slots), func(b *testing.B) {
			h := open(b, newCache(b, int64(slots)*slotBytes), zeroFile{}, HandleOptions{})
			body := setup(b, h, slots)
			for _, procs := range []int{1, 2, 4, 8} {
				b.Run(fmt.Sprintf("goroutines=%d", procs), func(b *testing.B) {
					b.ReportAllocs()
					goroutines(b, procs, body)
				})
			}
		})
	}
}

// goroutines runs body in n goroutines that share b.N.
func goroutines(b *testing.B, n int, body func(g, ops int)) {
	done := make(chan struct{})
	before := cpuTime(b)
	b.ResetTimer()
	for g := range n {
		go func() { // ends with its share of b.N
			body(g, b.N/n+1)
			done <- struct{}{}
		}()
	}
	for range n {
		<-done
	}
	b.StopTimer()
	b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// cpuTime returns the processor time of the process in user mode: what can be
// compared on a machine that has other work.
func cpuTime(b *testing.B) time.Duration {
	var ru unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &ru); err != nil {
		b.Fatal(err)
	}
	return time.Duration(ru.Utime.Nano())
}

// inTwoSets returns n offsets of tables that hash to the first two sets.
func inTwoSets(h *Handle, n int) []int64 {
	var offs []int64
	for off := int64(0); len(offs) < n; off += slotBytes {
		if _, set := h.c.set(h.seed, off); set < 2 {
			offs = append(offs, off)
		}
	}
	return offs
}

// cached gets the tables of offs and returns the offsets of those that stayed.
func cached(b *testing.B, h *Handle, offs []int64) []int64 {
	b.Helper()
	for _, off := range offs {
		get(b, h, 0, off).Unpin()
	}
	return slices.DeleteFunc(offs, func(off int64) bool {
		t, ok := h.TryGet(0, off)
		if ok {
			t.Unpin()
		}
		return !ok
	})
}

// sequence returns the offsets of n tables one after another.
func sequence(n int) []int64 {
	offs := make([]int64, n)
	for i := range offs {
		offs[i] = int64(i) * slotBytes
	}
	return offs
}

func hits(b *testing.B, h *Handle, offs []int64) func(g, n int) {
	return func(g, n int) {
		x := uint64(g)
		for range n {
			x = x*6364136223846793005 + 1442695040888963407
			t, err := h.Get(0, offs[(x>>32)%uint64(len(offs))])
			if err != nil {
				b.Error(err)
				return
			}
			t.Unpin()
		}
	}
}

// BenchmarkGetHit: Get and Unpin of a cached table.
func BenchmarkGetHit(b *testing.B) {
	benchSizes(b, func(b *testing.B, h *Handle, slots int) func(g, n int) {
		return hits(b, h, cached(b, h, inTwoSets(h, 4*ways)))
	})
}

func BenchmarkGetHitSpread(b *testing.B) {
	benchSizes(b, func(b *testing.B, h *Handle, slots int) func(g, n int) {
		return hits(b, h, cached(b, h, sequence(slots)))
	})
}

// misses gets tables of offs, in order, from a place that depends on g.
func misses(b *testing.B, h *Handle, offs []int64) func(g, n int) {
	return func(g, n int) {
		i := g * len(offs) / 8
		for range n {
			t, err := h.Get(0, offs[i%len(offs)])
			if err != nil {
				b.Error(err)
				return
			}
			t.Unpin()
			i++
		}
	}
}

// BenchmarkGetMiss: a Get that evicts a table of a full set and loads another,
// from a file that costs nothing, in two sets.
func BenchmarkGetMiss(b *testing.B) {
	benchSizes(b, func(b *testing.B, h *Handle, slots int) func(g, n int) {
		return misses(b, h, inTwoSets(h, 16*ways))
	})
}

func BenchmarkGetMissSpread(b *testing.B) {
	benchSizes(b, func(b *testing.B, h *Handle, slots int) func(g, n int) {
		cached(b, h, sequence(2*slots))
		return misses(b, h, sequence(8*slots))
	})
}

// BenchmarkPut: Get, Store and Unpin of a cached table, which is dirty already.
func BenchmarkPut(b *testing.B) {
	benchSizes(b, func(b *testing.B, h *Handle, slots int) func(g, n int) {
		offs := cached(b, h, inTwoSets(h, 4*ways))
		return func(g, n int) {
			x := uint64(g)
			for range n {
				x = x*6364136223846793005 + 1442695040888963407
				t, err := h.Get(0, offs[(x>>32)%uint64(len(offs))])
				if err != nil {
					b.Error(err)
					return
				}
				t.Store(int(x>>55), x)
				t.Unpin()
			}
		}
	})
}

// BenchmarkTakeover: New on the arena of a killed process, a quarter of it
// dirty, and Open of 100 images.
func BenchmarkTakeover(b *testing.B) {
	for _, slots := range []int{4096, 65536} {
		b.Run(fmt.Sprintf("slots=%d", slots), func(b *testing.B) {
			o := Options{Bytes: int64(slots) * slotBytes, Path: arenaPath(b)}
			id := func(i int) HandleOptions { return HandleOptions{ID: [16]byte{1, byte(i)}, Classes: 3} }
			const images = 100
			c := newArenaCache(b, o)
			for i := range images {
				h := open(b, c, zeroFile{}, id(i))
				for n := range slots / images / 4 {
					store(b, h, Class(n%3), int64(n)*slotBytes, 0, 1)
				}
			}
			o.Path = kill(b, c)
			b.ResetTimer()
			for b.Loop() {
				c, err := New(o)
				if err != nil {
					b.Fatal(err)
				}
				adopted := 0
				for i := range images {
					h, err := c.Open(zeroFile{}, id(i))
					if err != nil {
						b.Fatal(err)
					}
					adopted += h.Adopted()
				}
				if adopted < slots/8 {
					b.Fatalf("%d tables adopted", adopted)
				}
				if err := c.arena.unmap(); err != nil { // killed again
					b.Fatal(err)
				}
			}
		})
	}
}
