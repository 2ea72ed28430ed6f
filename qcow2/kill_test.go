package qcow2_test

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

var killStates = flag.Int("kill", 3000, "states that TestKilledAnywhere checks")

// A killRun does random operations on one image whose cache is in an arena, and
// at stores into the arena and at operations on the file, before, after and in
// the middle, looks at what a SIGKILL just then would leave: the arena as it is
// and the page cache as it is. A successor must find every acknowledged change
// (P1) in an image that is not corrupt (P3). Some successors are killed while they
// take over, and after some the power fails.
type killRun struct {
	t   *testing.T
	rng *rand.Rand
	dir string
	im  *qcow2.Image

	content []byte            // acknowledged
	snaps   map[string][]byte // acknowledged, by ID
	doing   killDoing
	flushed []byte      // what the last acknowledged flush made durable
	since   []killDoing // acknowledged after it

	counts killCounts
}

type killCounts struct {
	states int // looked at
	again  int // of them, in a takeover
	power  int // power losses after a takeover
}

// A killProcess is a process that may be killed: the one that does the
// operations, or a successor of it.
type killProcess struct {
	r       *killRun
	disk    *storagetest.Disk
	arena   string
	depth   int  // takeovers before it
	odds    int  // one state of odds is looked at
	looking bool // a look is under way, or nothing is to be looked at
}

// maxKillDepth bounds the kills of those who take over from the killed.
const maxKillDepth = 3

// killDoing is the operation that is not acknowledged yet.
type killDoing struct {
	text     string
	off, n   int64
	now      []byte // what [off, off+n) becomes; nil: nothing changes
	snapshot string // ID of a snapshot that comes or goes
	size     int64  // size that the disk grows to, 0: none
}

// killFile is the file of the image of a killProcess.
type killFile struct {
	*storagetest.Disk
	p *killProcess
}

func (f *killFile) WriteAt(p []byte, off int64) (int, error) {
	f.p.look(nil)
	if len(p) > storagetest.PageSize { // pwrite copies page by page
		cut := (1 + f.p.r.rng.IntN(len(p)/storagetest.PageSize)) * storagetest.PageSize
		f.p.look(func(d *storagetest.Disk) error {
			_, err := d.WriteAt(p[:cut], off)
			return err
		})
	}
	n, err := f.Disk.WriteAt(p, off)
	f.p.look(nil)
	return n, err
}

func (f *killFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	return f.WriteAt(bytes.Join(bufs, nil), off)
}

func (f *killFile) Truncate(size int64) error {
	err := f.Disk.Truncate(size)
	f.p.look(nil)
	return err
}

func (f *killFile) Punch(off, n int64) error {
	err := f.Disk.Punch(off, n)
	f.p.look(nil)
	return err
}

func (f *killFile) Datasync() error {
	err := f.Disk.Datasync()
	f.p.look(nil)
	return err
}

func killCache(path string, onStore func()) (*cache.Cache, error) {
	return cache.New(cache.Options{Bytes: 32 << 10, Path: path, OnStore: onStore})
}

var killImage = [16]byte{1}

// look checks the state of this moment, now and then. partial, if not nil,
// changes the copy of the file first.
func (p *killProcess) look(partial func(*storagetest.Disk) error) {
	r := p.r
	if p.looking || r.t.Failed() || r.rng.IntN(p.odds) != 0 {
		return
	}
	p.looking = true
	defer func() { p.looking = false }()
	disk := p.disk.Fork()
	if partial != nil {
		if err := partial(disk); err != nil {
			r.t.Error(err)
		}
	}
	mem, err := os.ReadFile(p.arena)
	if err != nil {
		r.t.Error(err)
		return
	}
	r.counts.states++
	next := &killProcess{r: r, disk: disk, arena: filepath.Join(r.dir, fmt.Sprint("successor", p.depth)), depth: p.depth + 1, odds: 8}
	next.looking = next.depth == maxKillDepth || r.rng.IntN(16) != 0
	if err := os.WriteFile(next.arena, mem, 0o600); err != nil {
		r.t.Error(err)
		return
	}
	if p.depth > 0 {
		r.counts.again++
	}
	if err := next.takeOver(); err != nil {
		r.t.Errorf("killed during %s, %d takeovers before: %v", r.doing.text, p.depth, err)
	}
}

// takeOver is the successor.
func (p *killProcess) takeOver() error {
	r, ctx := p.r, p.r.t.Context()
	c, err := killCache(p.arena, func() { p.look(nil) })
	if err != nil {
		return fmt.Errorf("arena: %w", err)
	}
	// A successor that is not told of the kill finds the same, but for leaks.
	told := r.rng.IntN(4) != 0
	im, err := qcow2.Open(ctx, &killFile{p.disk, p}, qcow2.Options{Cache: c, ID: killImage, Unclean: told, PassDiscard: true})
	p.looking = true
	if err != nil {
		return err
	}
	if err := r.checkContent(im, r.acknowledged); err != nil {
		return err
	}
	res, err := im.Check(ctx, qcow2.CheckOptions{})
	if err != nil || res.Corruptions > 0 || told && !res.Clean() {
		return fmt.Errorf("check after the takeover: %+v, %v", res, err)
	}
	if err := r.checkSnapshots(im, p.disk); err != nil {
		return err
	}
	if r.rng.IntN(8) == 0 {
		if err := r.losePower(im, p.disk); err != nil {
			return fmt.Errorf("power loss after the takeover: %w", err)
		}
	}
	if err := im.Close(); err != nil {
		return err
	}
	return c.Close()
}

// losePower lets the power fail once im was taken over, and now and then after a
// flush that the client has sent again.
func (r *killRun) losePower(im *qcow2.Image, disk *storagetest.Disk) error {
	r.counts.power++
	want := r.durable
	if r.rng.IntN(2) == 0 {
		if err := im.Flush(); err != nil {
			return err
		}
		want = r.acknowledged
	}
	disk = disk.CrashClone(r.rng)
	im, err := qcow2.Open(r.t.Context(), disk, qcow2.Options{Unclean: true})
	if err != nil {
		return err
	}
	if err := r.checkContent(im, want); err != nil {
		return err
	}
	res, err := im.Check(r.t.Context(), qcow2.CheckOptions{})
	if err != nil || !res.Clean() {
		return fmt.Errorf("check: %+v, %v", res, err)
	}
	if err := r.checkSnapshots(im, disk); err != nil {
		return err
	}
	return im.Close()
}

// checkSnapshots compares the snapshots of im, whose file is disk, with those
// that were acknowledged.
func (r *killRun) checkSnapshots(im *qcow2.Image, disk *storagetest.Disk) error {
	for _, s := range im.Snapshots() {
		if err := r.checkSnapshot(disk, s.ID); err != nil {
			return err
		}
	}
	for id := range r.snaps {
		if id != r.doing.snapshot && !hasSnapshot(im, id) {
			return fmt.Errorf("snapshot %s is lost", id)
		}
	}
	return nil
}

func hasSnapshot(im *qcow2.Image, id string) bool {
	for _, s := range im.Snapshots() {
		if s.ID == id {
			return true
		}
	}
	return false
}

// checkContent compares each sector of the image with what it may hold.
func (r *killRun) checkContent(im *qcow2.Image, may func(off int64, sector []byte) bool) error {
	size := im.Size()
	if size != int64(len(r.content)) && size != r.doing.size {
		return fmt.Errorf("size %d, want %d", size, len(r.content))
	}
	got := make([]byte, len(r.content))
	if _, err := im.ReadAt(got, 0); err != nil {
		return err
	}
	const sector = storagetest.SectorSize
	for off := 0; off < len(got); off += sector {
		if g, want := got[off:off+sector], r.content[off:off+sector]; !bytes.Equal(g, want) && !may(int64(off), g) {
			return fmt.Errorf("sector at %#x: %x…, want %x…", off, g[:8], want[:8])
		}
	}
	return nil
}

// acknowledged says what a sector may hold beside what was acknowledged: the
// operation under way may have changed it or not.
func (r *killRun) acknowledged(off int64, sector []byte) bool { return r.doing.wrote(off, sector) }

// durable says what a sector may hold after a power loss: what it held at the
// last flush, or what it was given since.
func (r *killRun) durable(off int64, sector []byte) bool {
	old := make([]byte, len(sector))
	if off < int64(len(r.flushed)) {
		old = r.flushed[off:][:len(sector)]
	}
	if bytes.Equal(sector, old) || r.doing.wrote(off, sector) {
		return true
	}
	for _, d := range r.since {
		if d.wrote(off, sector) {
			return true
		}
	}
	return false
}

// wrote reports whether d writes just this to the sector at off.
func (d *killDoing) wrote(off int64, sector []byte) bool {
	in := off - d.off
	return d.now != nil && in >= 0 && in < d.n && bytes.Equal(sector, d.now[in:][:len(sector)])
}

func (r *killRun) checkSnapshot(disk *storagetest.Disk, id string) error {
	want, known := r.snaps[id]
	if !known {
		if id != r.doing.snapshot {
			return fmt.Errorf("snapshot %s was never taken", id)
		}
		want = r.content
	}
	disk = disk.Clone()
	im, err := qcow2.Open(r.t.Context(), disk, qcow2.Options{ReadOnly: true, Snapshot: id})
	if err != nil {
		return err
	}
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("snapshot %s has changed", id)
	}
	return im.Close()
}

// do runs one random operation and acknowledges it.
func (r *killRun) do(clusterSize int64) error {
	ctx, rng, size := r.t.Context(), r.rng, int64(len(r.content))
	const sector = storagetest.SectorSize
	off := rng.Int64N(size/sector) * sector
	n := (1 + rng.Int64N(min((size-off)/sector, 1+4*clusterSize/sector))) * sector
	switch k := rng.IntN(20); {
	case k < 9:
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		r.doing = killDoing{text: fmt.Sprintf("write %d at %#x", n, off), off: off, n: n, now: data}
		_, err := r.im.WriteAt(data, off)
		copy(r.content[off:], data)
		return err
	case k < 11:
		r.doing = killDoing{text: fmt.Sprintf("zero %d at %#x", n, off), off: off, n: n, now: make([]byte, n)}
		err := r.im.WriteZeroes(off, n, k == 9)
		clear(r.content[off : off+n])
		return err
	case k < 14:
		off, n = off/clusterSize*clusterSize, (n+clusterSize-1)/clusterSize*clusterSize
		n = min(n, size-off)
		r.doing = killDoing{text: fmt.Sprintf("discard %d at %#x", n, off), off: off, n: n, now: make([]byte, n)}
		err := r.im.Discard(off, n)
		clear(r.content[off : off+n])
		return err
	case k < 17:
		r.doing = killDoing{text: "flush"}
		err := r.im.Flush()
		r.flushed, r.since = bytes.Clone(r.content), nil
		return err
	case k < 18 && len(r.snaps) < 2:
		r.doing = killDoing{text: "create snapshot", snapshot: fmt.Sprint("s", rng.Uint32())}
		_, err := r.im.CreateSnapshot(ctx, qcow2.Snapshot{ID: r.doing.snapshot})
		r.snaps[r.doing.snapshot] = bytes.Clone(r.content)
		return err
	case k < 19 && len(r.snaps) == 1 && r.revertible() != "" && rng.IntN(2) == 0: // refcounts of 2 bits hold one reference more
		id := r.revertible()
		r.doing = killDoing{text: "revert", off: 0, n: size, now: r.snaps[id]}
		err := r.im.ApplySnapshot(ctx, id)
		r.content = bytes.Clone(r.snaps[id])
		r.flushed, r.since = bytes.Clone(r.content), nil
		return err
	case k < 19 && len(r.snaps) > 0:
		for id := range maps.Keys(r.snaps) {
			r.doing = killDoing{text: "delete snapshot", snapshot: id}
			break
		}
		err := r.im.DeleteSnapshot(ctx, r.doing.snapshot)
		delete(r.snaps, r.doing.snapshot)
		return err
	case size < 512<<10:
		grown := size + (1+rng.Int64N(32))*sector
		r.doing = killDoing{text: "resize", size: grown}
		err := r.im.Resize(ctx, grown)
		r.content = append(r.content, make([]byte, grown-size)...)
		return err
	}
	return nil
}

// revertible returns a snapshot of the size that the image has, "" for none.
func (r *killRun) revertible() string {
	for _, id := range slices.Sorted(maps.Keys(r.snaps)) {
		if len(r.snaps[id]) == len(r.content) {
			return id
		}
	}
	return ""
}

// TestKilledAnywhere kills the process at every kind of moment and takes over.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	var total killCounts
	for i := 0; total.states < *killStates && !t.Failed(); i++ {
		clusterSize := []int64{512, 4096, 1024}[i%3]
		refcountBits := []int{16, 64, 2, 8}[i%4]
		r := &killRun{t: t, rng: rng, dir: scratch(t), snaps: make(map[string][]byte)}
		r.history(clusterSize, refcountBits, min(400, *killStates-total.states))
		total.states += r.counts.states
		total.again += r.counts.again
		total.power += r.counts.power
	}
	if t.Failed() {
		return // the zeroes below would not be true
	}
	t.Logf("kills: %d states, %d of them in a takeover, %d power losses after one: acknowledged writes lost 0, corruptions 0",
		total.states, total.again, total.power)
}

// history runs one image until limit states were checked.
func (r *killRun) history(clusterSize int64, refcountBits, limit int) {
	t, size := r.t, int64(96<<10)
	p := &killProcess{r: r, disk: storagetest.NewDisk(), arena: filepath.Join(r.dir, "arena"), odds: 12, looking: true}
	r.content = make([]byte, size)
	if err := qcow2.Create(t.Context(), p.disk, size, qcow2.CreateOptions{ClusterSize: clusterSize, RefcountBits: refcountBits}); err != nil {
		t.Fatal(err)
	}
	p.disk.RecordTail()
	r.doing.text = "open"
	c, err := killCache(p.arena, func() { p.look(nil) })
	if err != nil {
		t.Fatal(err)
	}
	r.im, err = qcow2.Open(t.Context(), &killFile{p.disk, p}, qcow2.Options{Cache: c, ID: killImage, PassDiscard: true})
	if err != nil {
		t.Fatal(err)
	}
	p.looking = false // the arena is ready
	for r.counts.states < limit && !t.Failed() {
		if err := r.do(clusterSize); err != nil {
			t.Errorf("%s: %v", r.doing.text, err)
		}
		r.since = append(r.since, r.doing)
		r.doing = killDoing{text: "nothing"}
	}
	p.looking = true
	if err := r.im.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
