package qcow2_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A sectorHistory is what one writer did to one sector, in order.
type sectorHistory []sectorVersion

// A sectorVersion is one change of a sector: seq 0 is zeroes. start and end
// count the events of the log when the request began and returned.
type sectorVersion struct {
	seq        uint64
	start, end int
}

// A span is the time of a flush, in events of the log.
type span struct{ start, end int }

// TestPowerLossConcurrent cuts the power while several goroutines write,
// discard and flush. Each sector has one writer, so that its order is known:
// it must hold its last flushed version or a later one (P2), and never what was
// written to another (P5, E8).
func TestPowerLossConcurrent(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	mc := newCache(t, 64<<10)
	states := 0
	for round := 0; states < *crashStates/4 && !t.Failed(); round++ {
		clusterSize := []int64{512, 1024, 4096}[round%3]
		c := crashConfig{name: "concurrent", size: 64 << 10, pass: round%2 == 0, create: qcow2.CreateOptions{ClusterSize: clusterSize}}
		d := newDisk(t, c.size, c.create)
		im := openDisk(t, d, c.options(mc))
		l := d.Record()
		histories, flushes := concurrentRun(t, d, im, rng, c.size, clusterSize)
		mustClose(t, im)
		seed := rng.Uint64()
		total := 0
		for range l.States(rand.New(rand.NewPCG(seed, 0)), 3) {
			total++
		}
		pick := rand.New(rand.NewPCG(seed, 1))
		for s := range l.States(rand.New(rand.NewPCG(seed, 0)), 3) {
			if pick.IntN(total) >= 250 {
				continue
			}
			states++
			if err := judgeConcurrent(t, c, s, histories, flushes); err != nil {
				t.Errorf("round %d, power loss after event %d of %d (%s): %v", round, s.At, len(l.Events()), s.What, err)
				break
			}
		}
	}
	t.Logf("power loss under concurrent requests: %d states", states)
}

// concurrentRun lets four writers and two flushers use im and returns what they did.
func concurrentRun(t *testing.T, d *storagetest.Disk, im *qcow2.Image, rng *rand.Rand, size, clusterSize int64) ([]sectorHistory, []span) {
	t.Helper()
	const writers = 4
	histories := make([]sectorHistory, size/512)
	var flushes []span
	var mu sync.Mutex
	var wg, others sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		others.Go(func() { // ends with the writers
			for {
				select {
				case <-stop:
					return
				default:
				}
				start := d.Position()
				if err := im.Flush(); err != nil {
					t.Errorf("Flush: %v", err)
					return
				}
				mu.Lock()
				flushes = append(flushes, span{start, d.Position()})
				mu.Unlock()
			}
		})
	}
	for w := range int64(writers) {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
		wg.Go(func() {
			for seq := uint64(1); seq <= 60; seq++ {
				// Clusters w, w+4, w+8, … belong to writer w.
				off := (rng.Int64N(size/clusterSize/writers)*writers + w) * clusterSize
				n := clusterSize
				v := sectorVersion{start: d.Position()}
				var err error
				switch rng.IntN(4) {
				case 0:
					err = im.Discard(off, n)
				case 1:
					err = im.WriteZeroes(off, n, true)
				default:
					v.seq = seq
					_, err = im.WriteAt(stamped(1, off, n, uint64(w), seq), off)
				}
				if err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
				v.end = d.Position()
				for s := off / 512; s < (off+n)/512; s++ {
					histories[s] = append(histories[s], v)
				}
			}
		})
	}
	wg.Wait()
	close(stop)
	others.Wait()
	return histories, flushes
}

// judgeConcurrent opens the image in state s and compares each sector with its history.
func judgeConcurrent(t *testing.T, c crashConfig, s storagetest.State, histories []sectorHistory, flushes []span) error {
	flushed := -1 // what returned at or before this event is durable
	for _, f := range flushes {
		if f.end <= s.At {
			flushed = max(flushed, f.start)
		}
	}
	im, err := qcow2.Open(t.Context(), s.Disk(), c.options(nil))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer im.Close()
	r, err := im.Check(t.Context(), qcow2.CheckOptions{})
	if err != nil || r.Corruptions+r.CheckErrors > 0 {
		return errors.Join(err, fmt.Errorf("%+v", r))
	}
	content := make([]byte, c.size)
	if _, err := im.ReadAt(content, 0); err != nil {
		return err
	}
	if err := wantStamps(content, 1, 0); err != nil {
		return err
	}
	for i, h := range histories {
		got, err := decodeStamp(content[i*512:][:512])
		if err != nil {
			return err
		}
		ok := got.seq == 0 // the sector's first content, until something is flushed
		for _, v := range h {
			if v.end <= flushed {
				ok = false
			}
			if v.start >= s.At && v.end > s.At {
				break
			}
			ok = ok || v.seq == got.seq
		}
		if !ok {
			return fmt.Errorf("sector %#x holds write %d; flushed until event %d: %+v", i*512, got.seq, flushed, h)
		}
	}
	return nil
}

// TestPowerLossReuseWaitsForRemoval discards a cluster while a flush is under
// way that no longer sees the discard: when the flush returns, the table in the
// file still names the cluster, and it must not be another's (E3, E8).
func TestPowerLossReuseWaitsForRemoval(t *testing.T) {
	const cluster, size = 4096, 64 << 10
	for _, punch := range []bool{false, true} {
		c := crashConfig{name: "reuse", size: size, pass: punch, create: qcow2.CreateOptions{ClusterSize: cluster}}
		d := newDisk(t, size, c.create)
		im := openDisk(t, d, c.options(nil))
		write := func(off int64) {
			t.Helper()
			if _, err := im.WriteAt(stamped(1, off, cluster, 0, 1), off); err != nil {
				t.Fatal(err)
			}
		}
		write(0)
		if err := im.Flush(); err != nil {
			t.Fatal(err)
		}
		l2 := get(t, d, get(t, d, 40, 8), 8) & 0x00fffffffffffe00
		l := d.Record()
		write(cluster) // the table is dirty
		held, release := make(chan struct{}), make(chan struct{})
		var first atomic.Bool // later requests may come there, and must not wait
		d.SetHook(func(_ storagetest.Op, off int64) {
			if off == l2 && first.CompareAndSwap(false, true) {
				close(held)
				<-release
			}
		})
		done := make(chan error, 1)
		go func() { done <- im.Flush() }() // ends when released
		<-held
		if err := im.Discard(0, cluster); err != nil {
			t.Fatal(err)
		}
		close(release)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		for off := int64(2 * cluster); off < size; off += cluster {
			write(off)
		}
		for s := range l.States(rand.New(rand.NewPCG(1, 1)), 8) {
			after, err := qcow2.Open(t.Context(), s.Disk(), c.options(nil))
			if err != nil {
				t.Fatalf("power loss after event %d (%s): %v", s.At, s.What, err)
			}
			if err := wantStamps(readAll(t, after), 1, 0); err != nil {
				t.Fatalf("power loss after event %d (%s): %v", s.At, s.What, err)
			}
			mustClose(t, after)
		}
		mustClose(t, im)
		verifyDisk(t, d)
	}
}
