package qcow2_test

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
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
// (P1) in an image that is not corrupt (P3).
type killRun struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	arena string
	disk  *storagetest.Disk
	im    *qcow2.Image

	content []byte            // acknowledged
	snaps   map[string][]byte // acknowledged, by ID
	doing   killDoing
	odds    int  // one state of odds is looked at
	looking bool // a look is under way: what the successor does is not looked at
	states  int
}

// killDoing is the operation that is not acknowledged yet.
type killDoing struct {
	text     string
	off, n   int64
	now      []byte // what [off, off+n) becomes; nil: nothing changes
	snapshot string // ID of a snapshot that comes or goes
	size     int64  // size that the disk grows to, 0: none
}

// killFile is the file of the image of a killRun.
type killFile struct {
	*storagetest.Disk
	r *killRun
}

func (f *killFile) WriteAt(p []byte, off int64) (int, error) {
	f.r.look(nil)
	if len(p) > storagetest.PageSize { // pwrite copies page by page
		cut := (1 + f.r.rng.IntN(len(p)/storagetest.PageSize)) * storagetest.PageSize
		f.r.look(func(d *storagetest.Disk) error {
			_, err := d.WriteAt(p[:cut], off)
			return err
		})
	}
	n, err := f.Disk.WriteAt(p, off)
	f.r.look(nil)
	return n, err
}

func (f *killFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	return f.WriteAt(bytes.Join(bufs, nil), off)
}

func (f *killFile) Truncate(size int64) error {
	err := f.Disk.Truncate(size)
	f.r.look(nil)
	return err
}

func (f *killFile) Punch(off, n int64) error {
	err := f.Disk.Punch(off, n)
	f.r.look(nil)
	return err
}

func (f *killFile) Datasync() error {
	err := f.Disk.Datasync()
	f.r.look(nil)
	return err
}

func killCache(path string, onStore func()) (*cache.Cache, error) {
	return cache.New(cache.Options{Bytes: 32 << 10, Path: path, OnStore: onStore})
}

var killImage = [16]byte{1}

// look checks the state of this moment, now and then. partial, if not nil,
// changes the copy of the file first.
func (r *killRun) look(partial func(*storagetest.Disk) error) {
	if r.looking || r.t.Failed() || r.rng.IntN(r.odds) != 0 {
		return
	}
	r.looking = true
	defer func() { r.looking = false }()
	disk := r.disk.Clone()
	if partial != nil {
		if err := partial(disk); err != nil {
			r.t.Error(err)
		}
	}
	mem, err := os.ReadFile(r.arena)
	if err != nil {
		r.t.Error(err)
		return
	}
	r.states++
	if err := r.takeOver(mem, disk); err != nil {
		r.t.Errorf("killed during %s: %v", r.doing.text, err)
	}
}

// takeOver is the successor.
func (r *killRun) takeOver(mem []byte, disk *storagetest.Disk) error {
	ctx := r.t.Context()
	path := filepath.Join(r.dir, "successor")
	if err := os.WriteFile(path, mem, 0o600); err != nil {
		return err
	}
	c, err := killCache(path, nil)
	if err != nil {
		return fmt.Errorf("arena: %w", err)
	}
	// A successor that is not told of the kill finds the same, but for leaks.
	told := r.rng.IntN(4) != 0
	im, err := qcow2.Open(ctx, disk, qcow2.Options{Cache: c, ID: killImage, Unclean: told, PassDiscard: true})
	if err != nil {
		return err
	}
	if err := r.checkContent(im); err != nil {
		return err
	}
	res, err := im.Check(ctx, qcow2.CheckOptions{})
	if err != nil || res.Corruptions > 0 || told && !res.Clean() {
		return fmt.Errorf("check after the takeover: %+v, %v", res, err)
	}
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
	if err := im.Close(); err != nil {
		return err
	}
	return c.Close()
}

func hasSnapshot(im *qcow2.Image, id string) bool {
	for _, s := range im.Snapshots() {
		if s.ID == id {
			return true
		}
	}
	return false
}

// checkContent compares the image with what was acknowledged; the operation under
// way may have changed each of its sectors or not.
func (r *killRun) checkContent(im *qcow2.Image) error {
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
		g, want := got[off:off+sector], r.content[off:off+sector]
		if bytes.Equal(g, want) {
			continue
		}
		in := int64(off) - r.doing.off
		if r.doing.now != nil && in >= 0 && in < r.doing.n && bytes.Equal(g, r.doing.now[in:in+sector]) {
			continue
		}
		return fmt.Errorf("sector at %#x: %x…, want %x…", off, g[:8], want[:8])
	}
	return nil
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
		return r.im.Flush()
	case k < 18 && len(r.snaps) < 2:
		r.doing = killDoing{text: "create snapshot", snapshot: fmt.Sprint("s", rng.Uint32())}
		_, err := r.im.CreateSnapshot(ctx, qcow2.Snapshot{ID: r.doing.snapshot})
		r.snaps[r.doing.snapshot] = bytes.Clone(r.content)
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

// TestKilledAnywhere kills the process at every kind of moment and takes over.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	rng := newRand(t)
	states := 0
	for i := 0; states < *killStates && !t.Failed(); i++ {
		clusterSize := []int64{512, 4096, 1024}[i%3]
		refcountBits := []int{16, 64, 2, 8}[i%4]
		r := &killRun{t: t, rng: rng, dir: scratch(t), disk: storagetest.NewDisk(), snaps: make(map[string][]byte), odds: 12}
		r.history(clusterSize, refcountBits, min(400, *killStates-states))
		states += r.states
	}
	if t.Failed() {
		return // the zeroes below would not be true
	}
	t.Logf("kills: %d states, acknowledged writes lost 0, corruptions 0", states)
}

// history runs one image until limit states were checked.
func (r *killRun) history(clusterSize int64, refcountBits, limit int) {
	t, size := r.t, int64(96<<10)
	r.arena = filepath.Join(r.dir, "arena")
	r.content = make([]byte, size)
	if err := qcow2.Create(t.Context(), r.disk, size, qcow2.CreateOptions{ClusterSize: clusterSize, RefcountBits: refcountBits}); err != nil {
		t.Fatal(err)
	}
	r.doing.text = "open"
	c, err := killCache(r.arena, func() { r.look(nil) })
	if err != nil {
		t.Fatal(err)
	}
	r.looking = true // the arena is not ready before the image is open
	r.im, err = qcow2.Open(t.Context(), &killFile{r.disk, r}, qcow2.Options{Cache: c, ID: killImage, PassDiscard: true})
	r.looking = false
	if err != nil {
		t.Fatal(err)
	}
	for r.states < limit && !t.Failed() {
		if err := r.do(clusterSize); err != nil {
			t.Errorf("%s: %v", r.doing.text, err)
		}
		r.doing = killDoing{text: "nothing"}
	}
	r.looking = true
	if err := r.im.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}
