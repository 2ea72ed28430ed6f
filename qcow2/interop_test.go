package qcow2_test

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
)

var interopRounds = flag.Int("interop", scaled(26), "images that the interop tests share with QEMU")

// A shared is an image that this package and QEMU write in turn, and what must
// be in it.
type shared struct {
	t     testing.TB
	rng   *rand.Rand
	dir   string
	path  string
	c     config
	bytes []byte
	snaps []modelSnapshot
	// share is how often the active state may count one cluster: once, or once
	// for each compressed cluster in it.
	share int64
}

// newShared makes an image on a backing chain; QEMU or we create it.
func newShared(t testing.TB, rng *rand.Rand, c config, byQEMU bool) *shared {
	t.Helper()
	s := &shared{t: t, rng: rng, dir: scratch(t), c: c, share: 1}
	s.path = filepath.Join(s.dir, "shared.qcow2")
	var below []byte
	backing, format := "", ""
	for i := range c.depth {
		size := (c.size/2 + rng.Int64N(c.size)) &^ 511
		content := make([]byte, size)
		copy(content, below)
		off := rng.Int64N(size) &^ 511
		copy(content[off:], fill(size/3, rng.Uint64()))
		raw := filepath.Join(s.dir, fmt.Sprintf("raw%d", i))
		if err := os.WriteFile(raw, content, 0o600); err != nil {
			t.Fatal(err)
		}
		next := fmt.Sprintf("base%d", i)
		if i == 0 && rng.IntN(2) == 0 {
			backing, format = fmt.Sprintf("raw%d", i), "raw"
		} else {
			args := []string{"convert", "-f", "raw", "-O", "qcow2"}
			if rng.IntN(2) == 0 {
				args = append(args, "-c")
			}
			if backing != "" {
				args = append(args, "-B", filepath.Join(s.dir, backing), "-F", format)
			}
			qemutest.Img(t, append(args, raw, filepath.Join(s.dir, next))...)
			if backing != "" {
				qemutest.Img(t, "rebase", "-u", "-f", "qcow2", "-b", backing, "-F", format, filepath.Join(s.dir, next))
			}
			backing, format = next, "qcow2"
		}
		below = content
	}
	if byQEMU {
		opts := []string{fmt.Sprintf("cluster_size=%d", c.clusterSize())}
		if c.version == 2 {
			opts = append(opts, "compat=0.10")
		} else {
			opts = append(opts, fmt.Sprintf("refcount_bits=%d", c.refcountBits), fmt.Sprintf("lazy_refcounts=%t", c.lazy))
		}
		if backing != "" {
			opts = append(opts, "backing_file="+backing, "backing_fmt="+format)
		}
		qemutest.Create(t, s.path, c.size, opts...)
	} else {
		o := c.create()
		o.BackingFile, o.BackingFormat = backing, format
		createFile(t, s.path, c.size, o)
	}
	s.bytes = make([]byte, c.size)
	copy(s.bytes, below)
	if byQEMU {
		s.compressed()
	}
	return s
}

// maxQEMUSnapshots is how many snapshots an image has at most when QEMU makes one.
const maxQEMUSnapshots = 3

// compressed lets QEMU write compressed clusters, which it does only where
// nothing is allocated. Many fit in one host cluster, and each snapshot counts
// all of them once more: with refcounts of 4 bits QEMU would refuse the third.
func (s *shared) compressed() {
	s.t.Helper()
	var commands []string
	size, most := s.c.clusterSize(), int64(24)
	if s.c.refcountBits == 4 {
		most = 15 / (1 + maxQEMUSnapshots)
	}
	for c := int64(0); c < int64(len(s.bytes))/size && c < most; c += 1 + s.rng.Int64N(3) {
		b := byte(1 + s.rng.IntN(255))
		commands = append(commands, fmt.Sprintf("write -c -P %d %d %d", b, c*size, size))
		copy(s.bytes[c*size:], bytes.Repeat([]byte{b}, int(size)))
		s.share = max(s.share, int64(len(commands)))
	}
	if len(commands) > 0 {
		qemutest.IO(s.t, s.path, commands...)
	}
}

// ours does n operations with this package.
func (s *shared) ours(n int) {
	s.t.Helper()
	m := &model{t: s.t, c: s.c, dir: s.dir, path: s.path, bytes: s.bytes, snaps: s.snaps}
	m.opts = qcow2.Options{Cache: newCache(s.t, s.c.cacheKiB<<10), PassDiscard: s.c.pass}
	m.open()
	if got := m.im.Size(); got != int64(len(s.bytes)) {
		s.t.Fatalf("our view of the size is %d, want %d", got, len(s.bytes))
	}
	wantSame(s.t, "our view of the content", readAll(s.t, m.im), s.bytes)
	for i := range m.snaps {
		m.useSnapshot("readsnap", i)
	}
	for _, o := range randomOps(s.rng, n, s.c.clusterSize()) {
		m.step(o)
		if s.t.Failed() {
			s.t.Fatalf("at operation %v", o)
		}
	}
	wantSame(s.t, "content after our turn", readAll(s.t, m.im), m.bytes)
	mustClose(s.t, m.im)
	verifyFile(s.t, s.path)
	s.bytes, s.snaps = m.bytes, m.snaps
}

// qemus does n operations with qemu-io and qemu-img.
func (s *shared) qemus(n int) {
	s.t.Helper()
	var commands []string
	add := func(f string, args ...any) { commands = append(commands, fmt.Sprintf(f, args...)) }
	for range n {
		size := int64(len(s.bytes))
		off := s.rng.Int64N(size) &^ 511
		length := min((1+s.rng.Int64N(3*s.c.clusterSize()))&^511+512, size-off)
		switch s.rng.IntN(9) {
		case 0, 1, 2, 3:
			b := byte(1 + s.rng.IntN(255))
			add("write -P %d %d %d", b, off, length)
			copy(s.bytes[off:], bytes.Repeat([]byte{b}, int(length)))
		case 4:
			add("write -z %d %d", off, length)
			clear(s.bytes[off : off+length])
		case 5:
			add("write -z -u %d %d", off, length)
			clear(s.bytes[off : off+length])
		case 6:
			if s.c.version == 2 && s.c.depth > 0 {
				continue // what was discarded shows the backing file or not
			}
			mask := s.c.clusterSize() - 1
			first, end := (off+mask)&^mask, (off+length)&^mask
			if first < end {
				add("discard %d %d", first, end-first)
				clear(s.bytes[first:end])
			}
		case 7:
			add("flush")
		case 8:
			if len(commands) > 0 {
				qemutest.IO(s.t, s.path, commands...)
				commands = nil
			}
			s.qemuStructure()
		}
	}
	qemutest.IO(s.t, s.path, append(commands, "flush")...)
	qemutest.Check(s.t, s.path)
}

// qemuCounts reports whether QEMU can count each cluster once more: for a new
// snapshot, or for one that it applies, before it lets go of what was there.
func (s *shared) qemuCounts() bool {
	return s.c.refcountBits > 8 || (2+int64(len(s.snaps)))*s.share < 1<<s.c.refcountBits
}

// qemuStructure lets qemu-img work with snapshots or grow the image.
func (s *shared) qemuStructure() {
	s.t.Helper()
	switch k := s.rng.IntN(4); {
	case k == 0 && len(s.snaps) < maxQEMUSnapshots && s.qemuCounts():
		name := fmt.Sprintf("q%d", s.rng.Uint32())
		qemutest.Img(s.t, "snapshot", "-c", name, s.path)
		list := qemutest.GetInfo(s.t, s.path).Snapshots
		s.snaps = append(s.snaps, modelSnapshot{list[len(list)-1].ID, name, bytes.Clone(s.bytes)})
	case k == 1 && len(s.snaps) > 0:
		i := s.rng.IntN(len(s.snaps))
		qemutest.Img(s.t, "snapshot", "-d", s.snaps[i].name, s.path)
		s.snaps = slices.Delete(s.snaps, i, i+1)
	case k == 2 && len(s.snaps) > 0 && s.qemuCounts():
		i := s.rng.IntN(len(s.snaps))
		if len(s.snaps[i].bytes) != len(s.bytes) && s.c.version == 2 {
			return
		}
		qemutest.Img(s.t, "snapshot", "-a", s.snaps[i].name, s.path)
		s.bytes = bytes.Clone(s.snaps[i].bytes)
	case k == 3 && len(s.snaps) == 0 && s.c.depth == 0:
		size := int64(len(s.bytes)) + (1+s.rng.Int64N(100))*512
		qemutest.Img(s.t, "resize", "-q", "-f", "qcow2", s.path, fmt.Sprint(size))
		s.bytes = append(s.bytes, make([]byte, size-int64(len(s.bytes)))...)
	}
}

// TestAlternatingOwners lets QEMU and this package write one image in turn,
// snapshots included; after each turn both see the same and check clean.
func TestAlternatingOwners(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	for i := range *interopRounds {
		c := configOf(rng, i)
		if c.refcountBits < 4 && i%2 == 0 {
			c.refcountBits = 16 // room for snapshots
		}
		seed, byQEMU := rng.Uint64(), i%2 == 0
		failure := attempt(t, func(tb testing.TB) {
			s := newShared(tb, rand.New(rand.NewPCG(seed, 2)), c, byQEMU)
			for turn := range 4 {
				if turn%2 == i/2%2 {
					s.ours(25)
				} else {
					s.qemus(25)
				}
				qemuView := &model{t: tb, dir: s.dir, path: s.path}
				qemuView.qemuReads("", s.bytes)
				for _, sn := range s.snaps {
					qemuView.qemuReads(sn.id, sn.bytes)
				}
			}
		})
		if failure != "" {
			t.Errorf("image %d, %v, made by QEMU: %v:\n%s", i, c, byQEMU, failure)
		}
	}
}

// TestSameListAsQEMU does the same writes with qemu-io on one image and with
// this package on another, and lets qemu-img compare the two.
func TestSameListAsQEMU(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	for i := range max(*interopRounds/2, 1) {
		c := configOf(rng, i*3+1)
		c.depth = 0
		dir := scratch(t)
		mine, theirs := filepath.Join(dir, "mine"), filepath.Join(dir, "theirs")
		createFile(t, mine, c.size, c.create())
		qemutest.Create(t, theirs, c.size, fmt.Sprintf("cluster_size=%d", c.clusterSize()))
		im := openPath(t, mine, qcow2.Options{})
		var commands []string
		for range 60 {
			off := rng.Int64N(c.size) &^ 511
			n := min(rng.Int64N(2*c.clusterSize())&^511+512, c.size-off)
			var err error
			switch b := byte(rng.IntN(256)); rng.IntN(4) {
			case 0, 1:
				commands = append(commands, fmt.Sprintf("write -P %d %d %d", b, off, n))
				_, err = im.WriteAt(bytes.Repeat([]byte{b}, int(n)), off)
			case 2:
				commands = append(commands, fmt.Sprintf("write -z %d %d", off, n))
				err = im.WriteZeroes(off, n, false)
			case 3:
				commands = append(commands, fmt.Sprintf("write -z -u %d %d", off, n))
				err = im.WriteZeroes(off, n, true)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, im)
		qemutest.IO(t, theirs, commands...)
		qemutest.Compare(t, "qcow2", mine, "qcow2", theirs)
		verifyFile(t, mine)
		verifyFile(t, theirs)
	}
}

// TestStatusAsQEMUMaps compares BlockStatus with qemu-img map.
func TestStatusAsQEMUMaps(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	for i := range 13 {
		c := configOf(rng, i)
		c.version, c.depth = 3, 0
		dir := scratch(t)
		path := filepath.Join(dir, "a.qcow2")
		createFile(t, path, c.size, c.create())
		im := openPath(t, path, qcow2.Options{})
		for _, o := range randomOps(rng, 30, c.clusterSize()) {
			off := o.off % c.size
			n := min(o.n, c.size-off)
			var err error
			switch o.kind {
			case "zero", "unmap":
				err = im.WriteZeroes(off, n, o.kind == "unmap")
			case "discard":
				err = im.Discard(off, n)
			default:
				_, err = im.WriteAt(fill(n, o.arg), off)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		mustClose(t, im)
		im = openPath(t, path, qcow2.Options{ReadOnly: true})
		for _, want := range qemutest.Map(t, path) {
			for off := want.Start; off < want.Start+want.Length; {
				got, err := im.BlockStatus(t.Context(), off, want.Start+want.Length-off)
				if err != nil {
					t.Fatal(err)
				}
				host := int64(-1)
				if want.Offset != nil {
					host = *want.Offset + off - want.Start
				}
				// QEMU looks for holes in the host file, too: data that is zero.
				zero := want.Zero && !want.Data
				if got.Data != want.Data || got.Zero != zero || got.Allocated != want.Present || got.HostOff != host {
					t.Errorf("cluster size %d: BlockStatus(%#x) = %+v, qemu-img map says %+v", c.clusterSize(), off, got, want)
				}
				off = got.End()
			}
		}
		mustClose(t, im)
	}
}

// TestInfoAsQEMU compares Info with qemu-img info.
func TestInfoAsQEMU(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	for i := range 13 {
		c := configOf(rng, i)
		path := filepath.Join(scratch(t), "a.qcow2")
		createFile(t, path, c.size, c.create())
		im := openPath(t, path, qcow2.Options{})
		if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "first"}); err != nil && c.refcountBits > 1 {
			t.Fatal(err)
		}
		got := im.Info()
		mustClose(t, im)
		want := qemutest.GetInfo(t, path)
		compat := map[string]int{"0.10": 2, "1.1": 3}[want.FormatSpecific.Data.Compat]
		if got.VirtualSize != want.VirtualSize || got.ClusterSize != want.ClusterSize || got.Version != compat ||
			got.LazyRefcounts != want.FormatSpecific.Data.LazyRefcounts || got.RefcountBits != want.FormatSpecific.Data.RefcountBits ||
			got.CompressionType != want.FormatSpecific.Data.CompressionType || len(got.Snapshots) != len(want.Snapshots) {
			t.Errorf("Info() = %+v, qemu-img info says %+v", got, want)
		}
		for i := range got.Snapshots {
			if got.Snapshots[i].ID != want.Snapshots[i].ID || got.Snapshots[i].Name != want.Snapshots[i].Name {
				t.Errorf("snapshot %d is %+v, qemu-img says %+v", i, got.Snapshots[i], want.Snapshots[i])
			}
		}
	}
}
