package qcow2_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// noLeaks fails the test if goroutines are left when it has cleaned up.
func noLeaks(t *testing.T) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// concurrentFile makes an image on a real host file.
func concurrentFile(t testing.TB, size int64, o qcow2.CreateOptions) string {
	t.Helper()
	path := filepath.Join(scratch(t), "concurrent.qcow2")
	createFile(t, path, size, o)
	return path
}

// TestConcurrentDisjointRanges lets many goroutines write, zero, discard and
// read their own stripes, which share clusters, while another one flushes. Each
// must always read what it wrote last.
func TestConcurrentDisjointRanges(t *testing.T) {
	noLeaks(t)
	for _, clusterSize := range []int64{512, 4096, 65536} {
		t.Run(fmt.Sprint(clusterSize), func(t *testing.T) {
			const workers, stripe = 8, 1024
			const size = 4 << 20
			rng := newRand(t)
			im := useFile(t, concurrentFile(t, size, qcow2.CreateOptions{ClusterSize: clusterSize}),
				qcow2.Options{Cache: newCache(t, 64<<10), PassDiscard: true})
			want := make([]byte, size)
			var wg, others sync.WaitGroup
			stop := make(chan struct{})
			others.Go(func() { // ends when the workers have
				for {
					select {
					case <-stop:
						return
					default:
					}
					if err := im.Flush(); err != nil {
						t.Errorf("Flush: %v", err)
						return
					}
				}
			})
			for w := range workers {
				rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
				wg.Go(func() {
					for i := range 400 {
						off := (rng.Int64N(size/stripe/workers)*workers + int64(w)) * stripe
						mine := want[off : off+stripe]
						switch rng.IntN(6) {
						case 0:
							if err := im.WriteZeroes(off, stripe, i%2 == 0); err != nil {
								t.Errorf("WriteZeroes: %v", err)
								return
							}
							clear(mine)
						case 1:
							got := make([]byte, stripe)
							if _, err := im.ReadAt(got, off); err != nil || !bytes.Equal(got, mine) {
								t.Errorf("worker %d reads other bytes than it wrote at %#x (error %v)", w, off, err)
								return
							}
						default:
							data := stamped(1, off, stripe, uint64(w), uint64(i+1))
							if _, err := im.WriteAt(data, off); err != nil {
								t.Errorf("WriteAt: %v", err)
								return
							}
							copy(mine, data)
						}
					}
				})
			}
			wg.Wait()
			close(stop)
			others.Wait()
			wantSame(t, "content", readAll(t, im), want)
			checkClean(t, im, false)
		})
	}
}

// TestConcurrentStorm overlaps everything: writes, zeroes, discards, reads,
// snapshots, their deletion and Check. No read may ever return bytes that were
// not written at its offset, and a snapshot reads the same for ever.
func TestConcurrentStorm(t *testing.T) {
	noLeaks(t)
	for _, clusterSize := range []int64{512, 4096, 65536} {
		t.Run(fmt.Sprint(clusterSize), func(t *testing.T) {
			const size = 2 << 20
			rng := newRand(t)
			path := concurrentFile(t, size, qcow2.CreateOptions{ClusterSize: clusterSize})
			im := useFile(t, path, qcow2.Options{Cache: newCache(t, 64<<10), PassDiscard: clusterSize != 4096})
			var seq atomic.Uint64
			var wg sync.WaitGroup
			for w := range 6 {
				rng := rand.New(rand.NewPCG(rng.Uint64(), 0))
				wg.Go(func() {
					for range 300 {
						if err := stormStep(im, rng, size, clusterSize, uint64(w), &seq); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Go(func() {
				for i := range 12 {
					if err := stormSnapshot(t.Context(), im, path, size); err != nil {
						t.Errorf("snapshot %d: %v", i, err)
						return
					}
				}
			})
			wg.Wait()
			if err := wantStamps(readAll(t, im), 1, 0); err != nil {
				t.Error(err)
			}
			checkClean(t, im, false)
		})
	}
}

// stormStep does one random request.
func stormStep(im *qcow2.Image, rng *rand.Rand, size, clusterSize int64, writer uint64, seq *atomic.Uint64) error {
	off := rng.Int64N(size) &^ 511
	n := min((1+rng.Int64N(4*clusterSize))&^511+512, size-off)
	switch rng.IntN(8) {
	case 0:
		return im.Discard(off, n)
	case 1:
		return im.WriteZeroes(off, n, rng.IntN(2) == 0)
	case 2:
		return im.Flush()
	case 3, 4:
		p := make([]byte, n)
		if _, err := im.ReadAt(p, off); err != nil {
			return err
		}
		return wantStamps(p, 1, off)
	}
	_, err := im.WriteAt(stamped(1, off, n, writer, seq.Add(1)), off)
	return err
}

// stormSnapshot takes a snapshot, reads it twice while writers go on, and
// deletes it.
func stormSnapshot(ctx context.Context, im *qcow2.Image, path string, size int64) error {
	s, err := im.CreateSnapshot(ctx, qcow2.Snapshot{Name: "storm"})
	if err != nil {
		return err
	}
	var first []byte
	for range 2 {
		f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: true})
		if err != nil {
			return err
		}
		sn, err := qcow2.Open(ctx, f, qcow2.Options{ReadOnly: true, Snapshot: s.ID})
		if err != nil {
			f.Close()
			return err
		}
		p := make([]byte, size)
		_, err = sn.ReadAt(p, 0)
		sn.Close()
		if err != nil {
			return err
		}
		if err := wantStamps(p, 1, 0); err != nil {
			return err
		}
		if first != nil && !bytes.Equal(first, p) {
			return fmt.Errorf("the snapshot has changed")
		}
		first = p
	}
	return im.DeleteSnapshot(ctx, s.ID)
}

// TestConcurrentSnapshotIsPointInTime counts up in many sectors while
// snapshots are taken: what was acknowledged before a snapshot is in it, what
// began after it returned is not (P4).
func TestConcurrentSnapshotIsPointInTime(t *testing.T) {
	noLeaks(t)
	const workers, size = 4, 1 << 20
	path := concurrentFile(t, size, qcow2.CreateOptions{ClusterSize: 4096})
	im := useFile(t, path, qcow2.Options{Cache: newCache(t, 64<<10)})
	var acked, begun [workers]atomic.Uint64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range workers {
		wg.Go(func() { // ends with the snapshots
			off := int64(w) * (size / workers)
			for i := uint64(1); ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				begun[w].Store(i)
				at := off + int64(i*7919%(size/workers/512))*512
				if _, err := im.WriteAt(stamped(1, at, 512, uint64(w), i), at); err != nil {
					t.Errorf("WriteAt: %v", err)
					return
				}
				acked[w].Store(i)
			}
		})
	}
	for range 10 {
		var before, after [workers]uint64
		for w := range workers {
			for acked[w].Load() < before[w]+20 && !t.Failed() {
				runtime.Gosched()
			}
			before[w] = acked[w].Load()
		}
		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "p"})
		if err != nil {
			t.Fatal(err)
		}
		for w := range workers {
			after[w] = begun[w].Load()
		}
		sn := openPath(t, path, qcow2.Options{ReadOnly: true, Snapshot: s.ID})
		got := readAll(t, sn)
		mustClose(t, sn)
		for w := range workers {
			newest := uint64(0)
			for i := 0; i < size/workers; i += 512 {
				st, err := decodeStamp(got[w*size/workers+i:][:512])
				if err != nil {
					t.Fatal(err)
				}
				newest = max(newest, st.seq)
			}
			if newest < before[w] || newest > after[w] {
				t.Errorf("the snapshot holds write %d of worker %d, want %d to %d", newest, w, before[w], after[w])
			}
			// One worker's writes come one after another: all up to the newest are in.
			for i := newest; i > 0 && i+20 > newest; i-- {
				at := w*size/workers + int(i*7919%(size/workers/512))*512
				if st, _ := decodeStamp(got[at:][:512]); st.seq < i {
					t.Errorf("the snapshot holds write %d of worker %d but not its write %d", newest, w, i)
				}
			}
		}
	}
	close(stop)
	wg.Wait()
}

// TestConcurrentResize grows an image while it is written.
func TestConcurrentResize(t *testing.T) {
	noLeaks(t)
	im := useFile(t, concurrentFile(t, 64<<10, qcow2.CreateOptions{ClusterSize: 512}), qcow2.Options{Cache: newCache(t, 64<<10)})
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for w := range 4 {
		rng := rand.New(rand.NewPCG(uint64(w), 0))
		wg.Go(func() { // ends with the growth
			for i := uint64(1); ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				off := rng.Int64N(im.Size()-512) &^ 511
				if _, err := im.WriteAt(stamped(1, off, 512, uint64(w), i), off); err != nil {
					t.Errorf("WriteAt: %v", err)
					return
				}
			}
		})
	}
	for size := int64(128 << 10); size <= 2<<20; size += 64 << 10 {
		if err := im.Resize(t.Context(), size); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if err := wantStamps(readAll(t, im), 1, 0); err != nil {
		t.Error(err)
	}
}

// TestConcurrentImagesShareCache writes several images through one small cache.
func TestConcurrentImagesShareCache(t *testing.T) {
	noLeaks(t)
	mc := newCache(t, 64<<10)
	var wg sync.WaitGroup
	for v := range int64(4) {
		const size = 1 << 20
		im := useFile(t, concurrentFile(t, size, qcow2.CreateOptions{ClusterSize: 512}), qcow2.Options{Cache: mc})
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(v), 0))
			for i := range uint64(500) {
				off := rng.Int64N(size-4096) &^ 511
				if _, err := im.WriteAt(stamped(v+1, off, 4096, 0, i), off); err != nil {
					t.Errorf("WriteAt: %v", err)
					return
				}
				p := make([]byte, 8192)
				off = rng.Int64N(size-8192) &^ 511
				if _, err := im.ReadAt(p, off); err != nil {
					t.Errorf("ReadAt: %v", err)
					return
				}
				if err := wantStamps(p, v+1, off); err != nil {
					t.Errorf("image %d: %v", v+1, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestConcurrentRequestKeepsItsCluster holds a request back between its look at
// the mapping and its I/O, while its cluster is discarded and others are
// written: the cluster must not become another's before the request has ended (E8, P5).
func TestConcurrentRequestKeepsItsCluster(t *testing.T) {
	const cluster, size = 4096, 1 << 20
	for _, writing := range []bool{false, true} {
		t.Run(fmt.Sprintf("writing=%t", writing), func(t *testing.T) {
			noLeaks(t)
			d := newDisk(t, size, qcow2.CreateOptions{ClusterSize: cluster})
			im := useDisk(t, d, qcow2.Options{PassDiscard: true})
			if _, err := im.WriteAt(stamped(1, 0, cluster, 0, 1), 0); err != nil {
				t.Fatal(err)
			}
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
			e, err := im.BlockStatus(t.Context(), 0, cluster)
			if err != nil {
				t.Fatal(err)
			}
			held, release := make(chan struct{}), make(chan struct{})
			var first atomic.Bool // later requests may come there, and must not wait
			d.SetHook(func(_ storagetest.Op, off int64) {
				if off == e.HostOff && first.CompareAndSwap(false, true) {
					close(held)
					<-release
				}
			})
			done := make(chan error, 1)
			go func() { // ends when released
				p := make([]byte, cluster)
				var err error
				if writing {
					_, err = im.WriteAt(stamped(1, 0, cluster, 0, 2), 0)
				} else if _, err = im.ReadAt(p, 0); err == nil {
					err = wantStamps(p, 1, 0)
				}
				done <- err
			}()
			<-held
			if err := im.Discard(0, cluster); err != nil {
				t.Error(err)
			}
			want := make([]byte, size)
			for off := int64(cluster); off < size/2; off += cluster {
				data := stamped(1, off, cluster, 1, 1)
				if _, err := im.WriteAt(data, off); err != nil {
					t.Error(err)
				}
				copy(want[off:], data)
				if err := im.Flush(); err != nil {
					t.Error(err)
				}
			}
			close(release)
			if err := <-done; err != nil {
				t.Error(err)
			}
			wantSame(t, "what others wrote", readAll(t, im)[cluster:], want[cluster:])
		})
	}
}

// TestConcurrentClose closes an image while requests are under way: each ends
// well or says that the image is closed, and no descriptor stays open.
func TestConcurrentClose(t *testing.T) {
	noLeaks(t)
	before := openDescriptors(t)
	for range 20 {
		path := concurrentFile(t, 1<<20, qcow2.CreateOptions{ClusterSize: 4096})
		im := openPath(t, path, qcow2.Options{})
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := uint64(1); ; i++ {
					off := int64(i*7919%256) * 4096
					if _, err := im.WriteAt(stamped(1, off, 512, uint64(w), i), off); err != nil {
						wantErrorIs(t, err, qcow2.ErrClosed)
						return
					}
					if err := im.Flush(); err != nil {
						wantErrorIs(t, err, qcow2.ErrClosed)
						return
					}
				}
			})
		}
		runtime.Gosched()
		mustClose(t, im)
		wg.Wait()
		wantErrorIs(t, im.Close(), qcow2.ErrClosed)
		verifyFile(t, path)
	}
	if after := openDescriptors(t); after != before {
		t.Errorf("%d descriptors are open, were %d", after, before)
	}
}

// openDescriptors counts the open descriptors of the process that are images.
func openDescriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && filepath.Base(target) == "concurrent.qcow2" {
			n++
		}
	}
	return n
}
