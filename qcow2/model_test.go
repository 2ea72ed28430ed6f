package qcow2_test

import (
	"bytes"
	"errors"
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

var (
	modelLists = flag.Int("model", scaled(60), "number of operation lists of TestModel")
	modelOps   = flag.Int("model-ops", 120, "operations in each list of TestModel")
	opsFlag    = flag.String("ops", "", "file with an operation list that TestModelReplay runs")
)

// A model is an image and what must be in it.
type model struct {
	t     testing.TB
	c     config
	dir   string
	path  string
	im    *qcow2.Image
	opts  qcow2.Options
	bytes []byte // content of the active state
	snaps []modelSnapshot
}

type modelSnapshot struct {
	id, name string
	bytes    []byte
}

// newModel builds the backing chain of c in a new directory and opens an
// overlay on it. The kinds and lengths of the backing files follow from c.seed.
func newModel(t testing.TB, c config) *model {
	t.Helper()
	m := &model{t: t, c: c, dir: scratch(t)}
	m.opts = qcow2.Options{Cache: newCache(t, c.cacheKiB<<10), PassDiscard: c.pass}
	rng := rand.New(rand.NewPCG(c.seed, 1))
	name, format := "", ""
	var below []byte
	for i := range c.depth {
		next := fmt.Sprintf("base%d", i)
		size := (c.size/2 + rng.Int64N(c.size)) &^ 511 // shorter or longer than the overlay
		below = m.makeBacking(rng, next, name, format, size, below)
		name, format = next, "qcow2"
		if i == 0 && rng.IntN(2) == 0 {
			format = "raw"
			qemutest.Img(t, "convert", "-f", "qcow2", "-O", "raw", filepath.Join(m.dir, next), filepath.Join(m.dir, "raw"))
			name = "raw"
		}
	}
	m.path = filepath.Join(m.dir, "top.qcow2")
	o := c.create()
	o.BackingFile, o.BackingFormat = name, format
	createFile(t, m.path, c.size, o)
	m.bytes = make([]byte, c.size)
	copy(m.bytes, below)
	m.open()
	return m
}

// makeBacking makes a qcow2 image of random content on top of below, some of
// it compressed, and returns its content.
func (m *model) makeBacking(rng *rand.Rand, name, below, belowFormat string, size int64, content []byte) []byte {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	o := m.c.create()
	if rng.IntN(2) == 0 {
		o.ClusterSize = 1 << (9 + rng.IntN(9))
	}
	o.BackingFile, o.BackingFormat = below, belowFormat
	createFile(m.t, path, size, o)
	bytes := make([]byte, size)
	copy(bytes, content)
	im := openPath(m.t, path, qcow2.Options{OpenBacking: openBacking(m.dir, nil)})
	for range 12 {
		off := rng.Int64N(size)
		data := fill(min(1+rng.Int64N(size/8), size-off), rng.Uint64())
		if rng.IntN(4) == 0 {
			clear(data)
		}
		if _, err := im.WriteAt(data, off); err != nil {
			m.t.Fatalf("write the backing file: %v", err)
		}
		copy(bytes[off:], data)
	}
	mustClose(m.t, im)
	if below == "" && rng.IntN(2) == 0 {
		packed := path + ".packed"
		kind := "compression_type=zlib"
		if m.c.version == 3 && rng.IntN(2) == 0 {
			kind = "compression_type=zstd"
		}
		qemutest.Img(m.t, "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", kind+",cluster_size="+fmt.Sprint(o.ClusterSize), path, packed)
		if err := os.Rename(packed, path); err != nil {
			m.t.Fatal(err)
		}
	}
	return bytes
}

func (m *model) open() {
	m.t.Helper()
	im := openPath(m.t, m.path, m.opts)
	m.im = im
	m.t.Cleanup(func() { im.Close() }) // for a list that fails; idempotent
}

// run does ops and then compares everything with QEMU.
func (m *model) run(ops []op) {
	m.t.Helper()
	for i, o := range ops {
		m.step(o)
		if m.t.Failed() {
			m.t.Fatalf("at operation %d: %v", i, o)
		}
	}
	m.finish()
}

func (m *model) step(o op) {
	m.t.Helper()
	size := int64(len(m.bytes))
	off := o.off % size
	n := min(o.n, size-off)
	fail := func(err error) {
		m.t.Helper()
		if err != nil {
			m.t.Fatalf("%v (off %#x, %d bytes): %v", o, off, n, err)
		}
	}
	switch o.kind {
	case "write", "writezeroes":
		data := fill(n, o.arg)
		if o.kind == "writezeroes" {
			clear(data)
		}
		done, err := m.im.WriteAt(data, off)
		fail(err)
		if int64(done) != n {
			m.t.Fatalf("%v: wrote %d of %d bytes", o, done, n)
		}
		copy(m.bytes[off:], data)
	case "read":
		got := make([]byte, n)
		_, err := m.im.ReadAt(got, off)
		fail(err)
		wantSame(m.t, fmt.Sprintf("%v at %#x", o, off), got, m.bytes[off:off+n])
	case "zero", "unmap":
		fail(m.im.WriteZeroes(off, n, o.kind == "unmap"))
		clear(m.bytes[off : off+n])
	case "discard":
		fail(m.im.Discard(off, n))
		m.discarded(off, n)
	case "flush":
		fail(m.im.Flush())
	case "snap":
		m.snapshot(o)
	case "delsnap", "apply", "readsnap":
		if len(m.snaps) > 0 {
			m.useSnapshot(o.kind, int(o.arg%uint64(len(m.snaps))))
		}
	case "resize":
		m.resize(min(size+(o.n+511)&^511, m.c.maxSize))
	case "reopen":
		fail(m.im.Close())
		if o.arg%4 == 0 {
			verifyFile(m.t, m.path)
		}
		m.open()
		if got := m.im.Size(); got != size {
			m.t.Fatalf("size after reopen is %d, want %d", got, size)
		}
	case "status":
		m.status(off, n)
	case "check":
		checkClean(m.t, m.im, false)
		wantSame(m.t, "content after check", readAll(m.t, m.im), m.bytes)
	}
}

// discarded takes over what a discard of [off, off+n) left: whole clusters are
// zero, bytes of other clusters are as before or zero.
func (m *model) discarded(off, n int64) {
	m.t.Helper()
	got := make([]byte, n)
	if _, err := m.im.ReadAt(got, off); err != nil {
		m.t.Fatal(err)
	}
	mask := m.c.clusterSize() - 1
	first, end := (off+mask)&^mask, (off+n)&^mask
	if m.c.version == 2 && m.c.depth > 0 {
		end = 0 // version 2 cannot say zero over a backing file, the content may stay
	}
	for i := range got {
		at := off + int64(i)
		if got[i] != 0 && (got[i] != m.bytes[at] || at >= first && at < end) {
			m.t.Fatalf("byte %#x is %#x after discard(%#x, %d), was %#x", at, got[i], off, n, m.bytes[at])
		}
	}
	copy(m.bytes[off:], got)
}

func (m *model) snapshot(o op) {
	m.t.Helper()
	if len(m.snaps) == 4 {
		return
	}
	s, err := m.im.CreateSnapshot(m.t.Context(), qcow2.Snapshot{Name: fmt.Sprint("s", o.arg)})
	if errors.Is(err, qcow2.ErrRefcountOverflow) && m.c.refcountBits < 8 {
		return // and nothing has changed, as the next reads and checks show
	}
	if err != nil {
		m.t.Fatalf("CreateSnapshot with %d snapshots: %v", len(m.snaps), err)
	}
	if s.DiskSize != int64(len(m.bytes)) {
		m.t.Errorf("the snapshot has %d bytes, want %d", s.DiskSize, len(m.bytes))
	}
	m.snaps = append(m.snaps, modelSnapshot{s.ID, s.Name, bytes.Clone(m.bytes)})
}

func (m *model) useSnapshot(kind string, i int) {
	m.t.Helper()
	s := m.snaps[i]
	switch kind {
	case "delsnap":
		if err := m.im.DeleteSnapshot(m.t.Context(), s.id); err != nil {
			m.t.Fatalf("DeleteSnapshot(%s): %v", s.id, err)
		}
		m.snaps = slices.Delete(m.snaps, i, i+1)
	case "apply":
		err := m.im.ApplySnapshot(m.t.Context(), s.id)
		if errors.Is(err, qcow2.ErrRefcountOverflow) && m.c.refcountBits < 8 {
			return
		}
		if err != nil {
			m.t.Fatalf("ApplySnapshot(%s): %v", s.id, err)
		}
		m.bytes = bytes.Clone(s.bytes)
		if got := m.im.Size(); got != int64(len(m.bytes)) {
			m.t.Fatalf("size after ApplySnapshot is %d, want %d", got, len(m.bytes))
		}
	case "readsnap":
		im := openPath(m.t, m.path, qcow2.Options{ReadOnly: true, Snapshot: s.id})
		wantSame(m.t, "snapshot "+s.id, readAll(m.t, im), s.bytes)
		mustClose(m.t, im)
	}
	var ids []string
	for _, s := range m.im.Snapshots() {
		ids = append(ids, s.ID)
	}
	var want []string
	for _, s := range m.snaps {
		want = append(want, s.id)
	}
	if !slices.Equal(ids, want) {
		m.t.Errorf("snapshots are %v, want %v", ids, want)
	}
}

func (m *model) resize(size int64) {
	m.t.Helper()
	err := m.im.Resize(m.t.Context(), size)
	if errors.Is(err, qcow2.ErrUnsupported) && m.c.version == 2 && len(m.snaps) > 0 {
		return
	}
	if errors.Is(err, qcow2.ErrOutOfRange) && size < int64(len(m.bytes)) {
		return
	}
	if err != nil {
		m.t.Fatalf("Resize(%d) from %d: %v", size, len(m.bytes), err)
	}
	if got := m.im.Size(); got != size {
		m.t.Fatalf("size after Resize(%d) is %d", size, got)
	}
	m.bytes = append(m.bytes, make([]byte, size-int64(len(m.bytes)))...)
}

// status compares BlockStatus of [off, off+n) with the content.
func (m *model) status(off, n int64) {
	m.t.Helper()
	for end := off + n; off < end; {
		e, err := m.im.BlockStatus(m.t.Context(), off, end-off)
		if err != nil {
			m.t.Fatalf("BlockStatus(%#x, %d): %v", off, end-off, err)
		}
		if e.Off != off || e.Len <= 0 || e.End() > end {
			m.t.Fatalf("BlockStatus(%#x, %d) = %+v", off, end-off, e)
		}
		if zero := len(bytes.Trim(m.bytes[off:e.End()], "\x00")) == 0; e.Zero && !zero {
			m.t.Fatalf("BlockStatus says zero: %+v", e)
		}
		if !e.Data && !e.Zero && !e.Compressed {
			m.t.Fatalf("BlockStatus says neither data nor zero: %+v", e)
		}
		off = e.End()
	}
}

// finish compares the active state and all snapshots, ours and QEMU's view.
func (m *model) finish() {
	m.t.Helper()
	wantSame(m.t, "content", readAll(m.t, m.im), m.bytes)
	mustClose(m.t, m.im)
	verifyFile(m.t, m.path)
	m.qemuReads("", m.bytes)
	for _, s := range m.snaps {
		m.qemuReads(s.id, s.bytes)
	}
	im := openPath(m.t, m.path, qcow2.Options{ReadOnly: true})
	wantSame(m.t, "content after reopen", readAll(m.t, im), m.bytes)
	mustClose(m.t, im)
}

func (m *model) qemuReads(snapshot string, want []byte) {
	m.t.Helper()
	raw := filepath.Join(m.dir, "out.raw")
	qemutest.Raw(m.t, m.path, snapshot, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		m.t.Fatal(err)
	}
	if snapshot != "" { // QEMU shows a snapshot at the size of the active state
		common := min(len(got), len(want))
		got, want = got[:common], want[:common]
	}
	wantSame(m.t, fmt.Sprintf("content as QEMU reads it (snapshot %q)", snapshot), got, want)
}

// TestModel does random operations on images over a matrix of options and
// compares them with a flat slice of bytes, and at the end with QEMU.
func TestModel(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	for i := range *modelLists {
		c := configOf(rng, i)
		ops := randomOps(rng, *modelOps, c.clusterSize())
		run := func(ops []op) string {
			return attempt(t, func(tb testing.TB) { newModel(tb, c).run(ops) })
		}
		if failure := run(ops); failure != "" {
			ops, failure = reduce(ops, failure, run)
			reportOps(t, c, ops, failure)
			return // one list is enough to work on
		}
	}
}

// TestModelReplay runs the list that -ops names, or the lists that once failed.
func TestModelReplay(t *testing.T) {
	t.Parallel()
	paths, err := filepath.Glob("testdata/ops/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if *opsFlag != "" {
		paths = []string{*opsFlag}
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			c, ops, err := parseOps(path)
			if err != nil {
				t.Fatal(err)
			}
			newModel(t, c).run(ops)
		})
	}
}
