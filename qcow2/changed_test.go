package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A lineage is a volume and clones of snapshots of it, each with snapshots of
// its own. What a clone is made from is named "<file>@<snapshot>".
type lineage struct {
	t       *testing.T
	dir     string
	rng     *rand.Rand
	states  []string // "<file>@<snapshot>", oldest first
	largest int64    // cluster size
	ends    []int64  // sizes that disks had
	number  uint64   // in every sector that was written: no two are alike
}

// open opens a state. It is its own opener of backing files.
func (l *lineage) open(_ context.Context, state, _ string) (qcow2.Disk, error) {
	file, snapshot, _ := strings.Cut(state, "@")
	f, err := qcow2.OpenFile(filepath.Join(l.dir, file), qcow2.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	im, err := qcow2.Open(l.t.Context(), f, qcow2.Options{ReadOnly: true, Snapshot: snapshot, OpenBacking: l.open})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return im, nil
}

func (l *lineage) use(state string) qcow2.Disk {
	l.t.Helper()
	d, err := l.open(l.t.Context(), state, "")
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { d.Close() })
	return d
}

// data returns n bytes of which each sector is different from all others.
func (l *lineage) data(n int64) []byte {
	p := make([]byte, n)
	for at := 0; at < len(p); at += 512 {
		l.number++
		binary.BigEndian.PutUint64(p[at:], l.number)
	}
	return p
}

// grow makes the volume file, over the state from, and takes snapshots of it
// between random changes.
func (l *lineage) grow(file string, clusterSize, size int64, from string, snapshots int) {
	t, rng := l.t, l.rng
	t.Helper()
	l.largest = max(l.largest, clusterSize)
	l.ends = append(l.ends, size)
	o := qcow2.CreateOptions{ClusterSize: clusterSize}
	if from != "" {
		o.BackingFile, o.BackingFormat = from, "qcow2"
	}
	path := filepath.Join(l.dir, file)
	createFile(t, path, size, o)
	im := openPath(t, path, qcow2.Options{PassDiscard: true, OpenBacking: l.open})
	for range snapshots {
		for range rng.IntN(20) {
			c := rng.Int64N(size / clusterSize)
			n := min(1+rng.Int64N(9), size/clusterSize-c)
			off := c * clusterSize
			var err error
			switch rng.IntN(7) {
			case 0, 1:
				_, err = im.WriteAt(l.data(n*clusterSize), off)
			case 2: // a part of a cluster
				_, err = im.WriteAt(l.data(512), off+rng.Int64N(clusterSize/512)*512)
			case 3:
				err = im.Discard(off, n*clusterSize)
			case 4:
				err = im.WriteZeroes(off, n*clusterSize, rng.IntN(2) == 0)
			default:
				for i := int64(0); i < n && err == nil; i++ {
					err = im.WriteCompressed(l.data(clusterSize), off+i*clusterSize)
				}
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
		if err != nil {
			t.Fatal(err)
		}
		l.states = append(l.states, file+"@"+s.ID)
		if rng.IntN(3) == 0 {
			size += rng.Int64N(30) * clusterSize
			if err := im.Resize(t.Context(), size); err != nil {
				t.Fatal(err)
			}
			l.ends = append(l.ends, size)
		}
	}
	mustClose(t, im)
}

// An extent is a range of guest bytes.
type extent struct{ off, n int64 }

func changed(t testing.TB, base, target qcow2.Disk, off int64) []extent {
	t.Helper()
	var spans []extent
	err := qcow2.Changed(t.Context(), base, target, off, func(off, n int64) error {
		spans = append(spans, extent{off, n})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return spans
}

// wantChanged compares the ranges with the bytes: none that differs is missed,
// and none is reported of a cluster that does not differ, but for
// zeroes, where a disk ended once, and between different files.
func (l *lineage) wantChanged(base, target string) {
	t := l.t
	t.Helper()
	var baseDisk qcow2.Disk
	var was []byte
	if base != "" {
		baseDisk = l.use(base)
		was = readAll(t, baseDisk)
	}
	disk := l.use(target)
	now := readAll(t, disk)
	if len(was) < len(now) {
		was = append(was, make([]byte, len(now)-len(was))...)
	}
	spans := changed(t, baseDisk, disk, 0)
	// A clone may have copied a cluster for a write that was undone since.
	exact := base == "" || base[0] == target[0]
	at := int64(0)
	for i, s := range spans {
		if s.n <= 0 || s.off < at || i > 0 && s.off == at || s.off+s.n > disk.Size() {
			t.Fatalf("%q to %q: range %+v after %#x of %#x bytes", base, target, s, at, disk.Size())
		}
		if !bytes.Equal(was[at:s.off], now[at:s.off]) {
			t.Fatalf("%q to %q: a difference in [%#x, %#x) is missed", base, target, at, s.off)
		}
		for c := s.off - s.off%l.largest; c < s.off+s.n; c += l.largest {
			from, to := max(c, s.off), min(c+l.largest, s.off+s.n)
			// Zeroes may be stored as data: around a small write, and where a base ends.
			// What was copied when the disk grew is as it was up to the old end.
			grown := slices.ContainsFunc(l.ends, func(end int64) bool { return c <= end && end < c+l.largest })
			if exact && !grown && bytes.Equal(was[from:to], now[from:to]) && !bytes.Equal(now[from:to], make([]byte, to-from)) {
				t.Fatalf("%q to %q: [%#x, %#x) does not differ", base, target, from, to)
			}
		}
		at = s.off + s.n
	}
	if !bytes.Equal(was[at:len(now)], now[at:]) {
		t.Fatalf("%q to %q: a difference from %#x on is missed", base, target, at)
	}
	off := l.rng.Int64N(disk.Size() + 1)
	var want []extent
	for _, s := range spans {
		if end := s.off + s.n; end > off {
			from := max(s.off, off)
			want = append(want, extent{from, end - from})
		}
	}
	if got := changed(t, baseDisk, disk, off); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("%q to %q from %#x on: %v, want %v", base, target, off, got, want)
	}
}

// TestChangedOfRandomHistories compares every pair of states of a volume, a clone
// of one of its snapshots with other clusters and another size, and a clone of
// the clone, and each state with nothing.
func TestChangedOfRandomHistories(t *testing.T) {
	sizes := []int64{512, 4096, 65536}
	for i := range scaled(8) {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			l := &lineage{t: t, dir: scratch(t), rng: newRand(t)}
			size := 2<<20 + l.rng.Int64N(1000)*512
			if i%3 == 0 {
				size = 300<<10 + l.rng.Int64N(100)*512 // one L2 table of 4 KiB clusters
			}
			pick := func() int64 { return sizes[l.rng.IntN(len(sizes))] }
			l.grow("a", pick(), size, "", 4)
			l.grow("b", pick(), size+l.rng.Int64N(2<<20)&^511, l.states[l.rng.IntN(len(l.states))], 3)
			l.grow("c", pick(), size, l.states[l.rng.IntN(len(l.states))], 2)
			for _, target := range l.states {
				l.wantChanged("", target)
				for _, base := range l.states {
					l.wantChanged(base, target)
				}
			}
		})
	}
}

// TestAllocatedAgreesWithQEMU compares what holds data with qemu-img map.
func TestAllocatedAgreesWithQEMU(t *testing.T) {
	l := &lineage{t: t, dir: scratch(t), rng: newRand(t)}
	for _, clusterSize := range []int64{512, 65536} {
		file := fmt.Sprint(clusterSize)
		l.states = nil
		l.grow(file, clusterSize, 3<<20, "", 3)
		for _, state := range l.states {
			_, id, _ := strings.Cut(state, "@")
			content, err := os.ReadFile(filepath.Join(l.dir, file))
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(l.dir, "applied")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			qemutest.Img(t, "snapshot", "-a", id, path)
			var want []extent
			for _, e := range qemutest.Map(t, path) {
				if !e.Data {
					continue
				}
				if n := len(want); n > 0 && want[n-1].off+want[n-1].n == e.Start {
					want[n-1].n += e.Length
				} else {
					want = append(want, extent{e.Start, e.Length})
				}
			}
			if got := changed(t, nil, l.use(state), 0); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("snapshot %s: %v, qemu-img map has %v", id, got, want)
			}
		}
	}
}

// TestChangedUnderWriters compares snapshots of an image that is written, while
// other snapshots of it come and go.
func TestChangedUnderWriters(t *testing.T) {
	const size = 4 << 20
	l := &lineage{t: t, dir: scratch(t), rng: newRand(t), largest: 4096}
	path := filepath.Join(l.dir, "live")
	im := newLiveImage(t, path, size, 4096)
	s := newStamper(size, im)
	s.during(t, func() {
		take := func() string {
			before := s.next.Load()
			for s.next.Load() < before+20 && !t.Failed() { // let it write
				time.Sleep(time.Millisecond)
			}
			snap, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
			if err != nil {
				t.Fatal(err)
			}
			return "live@" + snap.ID
		}
		first := take()
		for range 5 {
			gone := take()
			last := take()
			if err := im.DeleteSnapshot(t.Context(), strings.TrimPrefix(gone, "live@")); err != nil {
				t.Fatal(err)
			}
			l.wantDifferencesIn(first, last)
		}
	})
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
}

// wantDifferencesIn is wantChanged for data whose overwriting may not differ.
func (l *lineage) wantDifferencesIn(base, target string) {
	l.t.Helper()
	a, b := l.use(base), l.use(target)
	was, now := readAll(l.t, a), readAll(l.t, b)
	at := int64(0)
	for _, s := range append(changed(l.t, a, b, 0), extent{b.Size(), 0}) {
		if !bytes.Equal(was[at:s.off], now[at:s.off]) {
			l.t.Fatalf("%q to %q: a difference in [%#x, %#x) is missed", base, target, at, s.off)
		}
		at = s.off + s.n
	}
}

// TestChangedReadsNoDataAndSkipsTables counts what the comparison of two snapshots
// of 1 TiB reads: they have one L2 table of two that differs.
func TestChangedReadsNoDataAndSkipsTables(t *testing.T) {
	const size = 1 << 40
	d := newDisk(t, size, qcow2.CreateOptions{})
	im := openDisk(t, d, qcow2.Options{})
	write := func(off int64) {
		t.Helper()
		if _, err := im.WriteAt(fill(4096, uint64(off)), off); err != nil {
			t.Fatal(err)
		}
	}
	var ids []string
	for range 2 {
		write(5 << 30)
		if len(ids) == 0 {
			write(700 << 30)
		}
		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, s.ID)
	}
	mustClose(t, im)
	open := func(id string) *qcow2.Image {
		im, err := qcow2.Open(t.Context(), d, qcow2.Options{ReadOnly: true, Snapshot: id})
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
	d.Reopen()
	a, b := open(ids[0]), open(ids[1])
	begin := time.Now()
	all := changed(t, nil, b, 0)
	took := time.Since(begin)
	d.ResetCounts()
	delta := changed(t, a, b, 0)
	t.Logf("1 TiB: allocated in %v", took)
	if want := []extent{{5 << 30, 64 << 10}, {700 << 30, 64 << 10}}; fmt.Sprint(all) != fmt.Sprint(want) {
		t.Errorf("allocated %v, want %v", all, want)
	}
	if want := []extent{{5 << 30, 64 << 10}}; fmt.Sprint(delta) != fmt.Sprint(want) {
		t.Errorf("changed %v, want %v", delta, want)
	}
	if got := d.Bytes(storagetest.OpRead); got > 64<<10 {
		t.Errorf("the comparison read %d bytes: more than the table that differs", got)
	}
	for _, x := range []*qcow2.Image{a, b} {
		if _, err := x.SnapshotUsage(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// TestChangedErrors tries bad offsets and images that cannot be compared, and a
// visitor that gives up.
func TestChangedErrors(t *testing.T) {
	d := newDisk(t, 1<<20, qcow2.CreateOptions{})
	im := useDisk(t, d, qcow2.Options{})
	nothing := func(int64, int64) error { return nil }
	for _, off := range []int64{-1, 1<<20 + 1} {
		wantErrorIs(t, qcow2.Changed(t.Context(), nil, im, off, nothing), qcow2.ErrOutOfRange)
	}
	wantErrorIs(t, qcow2.Changed(t.Context(), nil, im, 0, nothing), qcow2.ErrUnsupported)

	l := &lineage{t: t, dir: scratch(t), rng: newRand(t)}
	l.grow("a", 4096, 1<<20, "", 1)
	path := filepath.Join(l.dir, "a")
	im = openPath(t, path, qcow2.Options{})
	if _, err := im.WriteAt(fill(8192, 1), 0); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	stop := errors.New("enough")
	wantErrorIs(t, qcow2.Changed(t.Context(), nil, l.use("a@"), 0, func(int64, int64) error { return stop }), stop)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	wantErrorIs(t, qcow2.Changed(ctx, nil, l.use("a@"), 0, nothing), context.Canceled)
}
