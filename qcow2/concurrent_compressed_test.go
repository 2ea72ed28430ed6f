package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"csi-qcow2/qcow2"
)

// TestConcurrentCompressed lets writers store compressed clusters, which share host
// clusters across their regions, overwrite and discard them, while snapshots come
// and go, some of which narrow refcounts cannot count.
func TestConcurrentCompressed(t *testing.T) {
	rng := newRand(t)
	for _, clusterSize := range []int64{512, 4096, 65536} {
		for _, bits := range []int{1, 2, 16} {
			t.Run(fmt.Sprintf("%d/%d", clusterSize, bits), func(t *testing.T) {
				concurrentCompressed(t, clusterSize, bits, rng.Uint64())
			})
		}
	}
}

func concurrentCompressed(t *testing.T, clusterSize int64, bits int, seed uint64) {
	const workers, clusters = 6, 96 // of a worker's region
	region := clusters * clusterSize
	d := newDisk(t, workers*region, qcow2.CreateOptions{ClusterSize: clusterSize, RefcountBits: bits})
	im := useDisk(t, d, qcow2.Options{PassDiscard: true, Cache: newCache(t, 256<<10), ReclaimAfter: time.Millisecond})
	want := make([]byte, workers*region)
	stop := make(chan struct{})
	var snapshots, writers sync.WaitGroup
	snapshots.Go(func() { // ends when stop is closed
		var ids []string
		for rng := rand.New(rand.NewPCG(seed, workers)); ; {
			select {
			case <-stop:
				return
			default:
			}
			if len(ids) > 2 {
				i := rng.IntN(len(ids))
				if err := im.DeleteSnapshot(t.Context(), ids[i]); err != nil {
					t.Errorf("delete a snapshot: %v", err)
				}
				ids = append(ids[:i], ids[i+1:]...)
			}
			s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
			switch {
			case err == nil:
				ids = append(ids, s.ID)
			case errors.Is(err, qcow2.ErrRefcountOverflow) && len(ids) > 0:
				err = im.DeleteSnapshot(t.Context(), ids[0])
				ids = ids[1:]
			case errors.Is(err, qcow2.ErrRefcountOverflow):
				err = nil
			}
			if err != nil {
				t.Errorf("snapshot: %v", err)
				return
			}
		}
	})
	for w := range int64(workers) {
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			mine := want[w*region:][:region]
			for range scaled(400) {
				at := rng.Int64N(clusters) * clusterSize
				n := min(1+rng.Int64N(3*clusterSize), region-at)
				off := w*region + at
				var err error
				switch rng.IntN(7) {
				case 0, 1, 2:
					p := bytes.Repeat([]byte{byte(rng.Uint32())}, int(clusterSize))
					copy(mine[at:], p)
					err = im.WriteCompressed(p, off)
				case 3:
					p := fill(n, rng.Uint64())
					copy(mine[at:], p)
					_, err = im.WriteAt(p, off)
				case 4:
					clear(mine[at : at+clusterSize])
					err = im.Discard(off, clusterSize)
				case 5:
					clear(mine[at : at+n])
					err = im.WriteZeroes(off, n, rng.IntN(2) == 0)
				case 6:
					p := make([]byte, n)
					if _, err = im.ReadAt(p, off); err == nil && !bytes.Equal(p, mine[at:at+n]) {
						err = fmt.Errorf("other bytes at %#x", off)
					}
					err = errors.Join(err, im.Flush())
				}
				if err != nil {
					t.Errorf("writer %d: %v", w, err)
					return
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	snapshots.Wait()
	wantSame(t, "the disk", readAll(t, im), want)
	checkClean(t, im, true)
}
