package qcow2_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"csi-qcow2/qcow2"
)

// rawImage reads the tables of a closed image by itself, to judge what the
// package says about them. It knows version 3 and refcounts of 16 bits.
type rawImage struct {
	t       testing.TB
	b       []byte
	cluster int64
}

func readRaw(t testing.TB, path string) *rawImage {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &rawImage{t: t, b: b}
	r.cluster = 1 << r.u32(20)
	return r
}

func (r *rawImage) u32(off int64) int64 { return int64(binary.BigEndian.Uint32(r.b[off:])) }

func (r *rawImage) u64(off int64) uint64 {
	if off+8 > int64(len(r.b)) {
		return 0 // a table's end may lie beyond the end of the file
	}
	return binary.BigEndian.Uint64(r.b[off:])
}

const rawOffset = 0x00fffffffffffe00

// allocated returns how many clusters have a refcount.
func (r *rawImage) allocated() (n int64) {
	table, clusters := int64(r.u64(48)), r.u32(56)
	for e := table; e < table+clusters*r.cluster; e += 8 {
		block := int64(r.u64(e) & rawOffset)
		for at := block; block != 0 && at < min(block+r.cluster, int64(len(r.b))); at += 2 {
			if binary.BigEndian.Uint16(r.b[at:]) != 0 {
				n++
			}
		}
	}
	return n
}

// clusters returns the host clusters that the state with this L1 table uses.
func (r *rawImage) clusters(l1, entries int64) map[int64]bool {
	used := map[int64]bool{}
	use := func(off, n int64) {
		for c := off / r.cluster; c <= (off+n-1)/r.cluster; c++ {
			used[c] = true
		}
	}
	use(l1, max(entries*8, 1))
	shift := 62 - (r.u32(20) - 8)
	for i := range entries {
		l2 := int64(r.u64(l1+i*8) & rawOffset)
		if l2 == 0 {
			continue
		}
		use(l2, r.cluster)
		for at := l2; at < l2+r.cluster; at += 8 {
			e := r.u64(at)
			if e>>62&1 != 0 {
				off := int64(e & (1<<shift - 1))
				sectors := int64(e&(1<<62-1)>>shift) + 1
				use(off, sectors*512-off%512)
			} else if e&rawOffset != 0 {
				use(int64(e&rawOffset), 1)
			}
		}
	}
	return used
}

// states returns the clusters of the active state and of each snapshot.
func (r *rawImage) states() []map[int64]bool {
	states := []map[int64]bool{r.clusters(int64(r.u64(40)), r.u32(36))}
	at := int64(r.u64(64))
	for range r.u32(60) {
		states = append(states, r.clusters(int64(r.u64(at)), r.u32(at+8)))
		id, name := int64(binary.BigEndian.Uint16(r.b[at+12:])), int64(binary.BigEndian.Uint16(r.b[at+14:]))
		at += (40 + r.u32(at+36) + id + name + 7) &^ 7
	}
	return states
}

// wantUsage holds what the image at path says of itself to its tables.
func wantUsage(t *testing.T, path string) qcow2.Usage {
	t.Helper()
	im := openPath(t, path, qcow2.Options{})
	u, err := im.SnapshotUsage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	r := readRaw(t, path)
	states, holders := r.states(), map[int64]int{}
	for _, s := range states {
		for c := range s {
			holders[c]++
		}
	}
	all := append([]qcow2.StateUsage{u.Active}, u.Snapshots...)
	if len(all) != len(states) {
		t.Fatalf("%d states, want %d", len(all), len(states))
	}
	sum := u.Metadata + u.Shared
	for i, s := range states {
		want := qcow2.StateUsage{ID: all[i].ID, Name: all[i].Name}
		for c := range s {
			if holders[c] == 1 {
				want.Unique += r.cluster
			} else {
				want.Shared += r.cluster
			}
		}
		if all[i] != want {
			t.Errorf("state %d: %+v, want %+v", i, all[i], want)
		}
		sum += want.Unique
	}
	shared := int64(0)
	for _, n := range holders {
		if n > 1 {
			shared += r.cluster
		}
	}
	if u.Shared != shared || u.Total != r.allocated()*r.cluster || u.Total != sum {
		t.Errorf("%+v: want %d shared and %d in total, the sum of its parts, which is %d", u, shared, r.allocated()*r.cluster, sum)
	}
	return u
}

// usageHistory makes an image with snapshots by random writes, zeroes, discards,
// compressed writes and resizes.
func usageHistory(t *testing.T, rng *rand.Rand, path string, clusterSize int64) {
	t.Helper()
	size := 96*clusterSize + rng.Int64N(600)*512
	createFile(t, path, size, qcow2.CreateOptions{ClusterSize: clusterSize})
	im := openPath(t, path, qcow2.Options{PassDiscard: true})
	for range 6 {
		for range 25 {
			c := rng.Int64N(size / clusterSize)
			n := min(1+rng.Int64N(6), size/clusterSize-c)
			off := c * clusterSize
			var err error
			switch rng.IntN(7) {
			case 0, 1, 2:
				_, err = im.WriteAt(fill(n*clusterSize-512, rng.Uint64()), off)
			case 3:
				err = im.Discard(off, n*clusterSize)
			case 4:
				err = im.WriteZeroes(off, n*clusterSize, rng.IntN(2) == 0)
			default: // compressible
				for i := range n {
					p := make([]byte, clusterSize)
					copy(p, fill(100+rng.Int64N(clusterSize/3), rng.Uint64()))
					if err = im.WriteCompressed(p, off+i*clusterSize); err != nil {
						break
					}
				}
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{}); err != nil {
			t.Fatal(err)
		}
		if rng.IntN(3) == 0 {
			size += rng.Int64N(40) * clusterSize
			if err := im.Resize(t.Context(), size); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustClose(t, im)
}

// TestUsageOfRandomHistories compares the figures with the tables of the file,
// and deletes the snapshots in random order: each gives back what was unique to
// it, and whoever is left owns the rest.
func TestUsageOfRandomHistories(t *testing.T) {
	for i := range scaled(24) {
		clusterSize := []int64{512, 4096, 65536}[i%3]
		t.Run(fmt.Sprintf("%d-%d", clusterSize, i), func(t *testing.T) {
			rng := newRand(t)
			path := filepath.Join(scratch(t), "usage.qcow2")
			usageHistory(t, rng, path, clusterSize)
			u := wantUsage(t, path)
			for len(u.Snapshots) > 0 && !t.Failed() {
				gone := u.Snapshots[rng.IntN(len(u.Snapshots))]
				im := openPath(t, path, qcow2.Options{})
				if err := im.DeleteSnapshot(t.Context(), gone.ID); err != nil {
					t.Fatal(err)
				}
				mustClose(t, im)
				now := wantUsage(t, path)
				if freed := (u.Total - u.Metadata) - (now.Total - now.Metadata); freed != gone.Unique {
					t.Errorf("deleting snapshot %s gave back %d bytes, %d were unique to it", gone.ID, freed, gone.Unique)
				}
				u = now
			}
			if u.Shared != 0 || u.Active.Shared != 0 || u.Active.Unique != u.Total-u.Metadata {
				t.Errorf("alone, the active state does not own all: %+v", u)
			}
			verifyFile(t, path)
		})
	}
}

// TestUsageReadOnly reads the same figures from an image opened read-only, also
// at one of its snapshots.
func TestUsageReadOnly(t *testing.T) {
	path := filepath.Join(scratch(t), "usage.qcow2")
	usageHistory(t, newRand(t), path, 4096)
	want := wantUsage(t, path)
	for _, snapshot := range []string{"", want.Snapshots[2].ID} {
		im := openPath(t, path, qcow2.Options{ReadOnly: true, Snapshot: snapshot})
		got, err := im.SnapshotUsage(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		mustClose(t, im)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("at snapshot %q: %+v, want %+v", snapshot, got, want)
		}
	}
}

// TestUsageUnderWriters asks while guests write and snapshots come and go: no
// error, and figures that fit together; afterwards they are exact.
func TestUsageUnderWriters(t *testing.T) {
	const size, clusterSize = 4 << 20, 4096
	path := filepath.Join(scratch(t), "live.qcow2")
	im := newLiveImage(t, path, size, clusterSize)
	s := newStamper(size, im)
	s.during(t, func() {
		for i := range 8 {
			if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{}); err != nil {
				t.Error(err)
				return
			}
			var wg sync.WaitGroup
			if i > 2 {
				wg.Go(func() {
					if err := im.DeleteSnapshot(t.Context(), im.Snapshots()[0].ID); err != nil {
						t.Error(err)
					}
				})
			}
			for range 4 {
				u, err := im.SnapshotUsage(t.Context())
				if err != nil {
					t.Error(err)
					break
				}
				for _, s := range append(u.Snapshots, u.Active) {
					if s.Unique < clusterSize || s.Unique+s.Shared > size+size/8 {
						t.Errorf("%+v of an image of %d bytes", s, size)
					}
				}
			}
			wg.Wait()
		}
	})
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	wantUsage(t, path)
	verifyFile(t, path)
}

// TestUsageBesideLongerSnapshot asks for the usage of a disk that an apply made
// shorter than a snapshot of it.
func TestUsageBesideLongerSnapshot(t *testing.T) {
	const short, long = 64 << 10, 512 << 10 // 2 and 16 entries of an L1 table
	im := useDisk(t, newDisk(t, short, qcow2.CreateOptions{ClusterSize: 512}), qcow2.Options{})
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "short"})
	do(err)
	do(im.Resize(t.Context(), long))
	_, err = im.WriteAt(fill(512, 1), long-512)
	do(err)
	_, err = im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "long"})
	do(err)
	do(im.ApplySnapshot(t.Context(), s.ID))
	u, err := im.SnapshotUsage(t.Context())
	do(err)
	// The cluster, its L2 table, and an L1 table of 16 entries.
	if got := u.Snapshots[1].Unique; got != 3*512 {
		t.Errorf("the longer snapshot holds %d bytes alone, want %d", got, 3*512)
	}
}
