package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// faultOps is what the fault tests do: every kind of request, with data that
// is overwritten in place, copied and freed.
func faultOps(clusterSize int64) []op {
	c := clusterSize
	return []op{
		{"write", 0, 4 * c, 1},
		{"flush", 0, 0, 0},
		{"write", c / 2 &^ 511, max(c/4&^511, 512), 2}, // in place
		{"write", 9 * c, max(c/2, 512), 3},
		{"snap", 0, 0, 0},
		{"write", c, max(c/2, 512), 4}, // copies
		{"read", 0, 12 * c, 0},
		{"discard", 2 * c, c, 0},
		{"flush", 0, 0, 0},
		{"write", 14 * c, 2 * c, 5},
		{"unmap", 0, c + 512, 0},
		{"snap", 0, 0, 0},
		{"write", 3 * c, 2 * c, 6},
		{"resize", 0, 40 * c, 0},
		{"delsnap", 0, 0, 0},
		{"flush", 0, 0, 0},
		{"write", 50 * c, 3 * c, 7},
		{"apply", 0, 0, 0},
		{"write", 5 * c, c, 8},
		{"delsnap", 0, 0, 0},
		{"flush", 0, 0, 0},
		{"read", 0, 16 * c, 0},
	}
}

// A faultModel holds, for each sector, what it may read as: more than one
// value after a request on it failed.
type faultModel struct {
	now   [][]string // what a read may return
	since [][]string // what the sector may be after a failed flush: its flushed value and all later ones
	snaps map[string][][]string
	sizes []int64 // that the image may have
}

func newFaultModel(size int64) *faultModel {
	m := &faultModel{snaps: map[string][][]string{}, sizes: []int64{size}}
	m.grow(size)
	return m
}

func (m *faultModel) grow(size int64) {
	for int64(len(m.now)) < size/512 {
		m.now = append(m.now, []string{string(zeroSector[:])})
		m.since = append(m.since, []string{string(zeroSector[:])})
	}
}

// put records a write of data at off that returned err.
func (m *faultModel) put(off int64, data []byte, err error) {
	for i := 0; i < len(data); i += 512 {
		s, v := (off+int64(i))/512, string(data[i:i+512])
		if err == nil {
			m.now[s] = nil
		}
		m.now[s] = append(m.now[s], v)
		m.since[s] = append(m.since[s], v)
	}
}

// flushed records that everything is durable.
func (m *faultModel) flushed() {
	for i := range m.now {
		m.since[i] = slices.Clone(m.now[i])
	}
}

// verify compares data, read from off, with sets.
func (m *faultModel) verify(data []byte, off int64, sets [][]string) error {
	for i := 0; i < len(data); i += 512 {
		s := (off + int64(i)) / 512
		want := []string{string(zeroSector[:])}
		if int(s) < len(sets) {
			want = sets[s]
		}
		if !slices.Contains(want, string(data[i:i+512])) {
			return fmt.Errorf("sector %#x is % x…, want one of %d values, % x…", s*512, data[i:i+8], len(want), want[0][:8])
		}
	}
	return nil
}

// A faultRun runs faultOps on an image whose host file has a fault.
type faultRun struct {
	c     crashConfig
	mc    *cache.Cache
	disk  *storagetest.Disk
	im    *qcow2.Image
	m     *faultModel
	fault *storagetest.Fault

	surfaced  bool // some request returned the injected error
	failed    bool // a flush failed
	syncAgain bool // and a later one succeeded
}

// saw notes the error of a request and whether it is one that a fault explains.
func (r *faultRun) saw(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, r.fault.Err) {
		r.surfaced = true
		return nil
	}
	if errors.Is(err, qcow2.ErrFailed) && r.surfaced {
		return nil
	}
	return fmt.Errorf("unexpected error: %w", err)
}

func (r *faultRun) step(o op) error {
	ctx := context.Background()
	size := r.im.Size()
	off, n := min(o.off, size-512), o.n
	n = min(n, size-off)
	ids := r.im.Snapshots()
	switch o.kind {
	case "write":
		data := fill(n, o.arg)
		_, err := r.im.WriteAt(data, off)
		r.m.put(off, data, err)
		return r.saw(err)
	case "unmap":
		err := r.im.WriteZeroes(off, n, true)
		r.m.put(off, make([]byte, n), err)
		return r.saw(err)
	case "discard":
		err := r.im.Discard(off, n)
		r.m.put(off, make([]byte, n), err)
		return r.saw(err)
	case "read":
		data := make([]byte, n)
		_, err := r.im.ReadAt(data, off)
		if err != nil {
			return r.saw(err)
		}
		if r.fault.Drop && r.surfaced { // the host has lost what it had not written, without a word
			return nil
		}
		return r.m.verify(data, off, r.m.now)
	case "flush":
		err := r.im.Flush()
		if err == nil && r.failed {
			r.syncAgain = true
		}
		if err != nil {
			r.failed = true
		} else {
			r.m.flushed()
		}
		return r.saw(err)
	case "snap":
		s, err := r.im.CreateSnapshot(ctx, qcow2.Snapshot{Name: "s"})
		if err == nil {
			r.m.snaps[s.ID] = cloneSets(r.m.now)
		}
		return r.saw(err)
	case "delsnap":
		if len(ids) == 0 {
			return nil
		}
		err := r.im.DeleteSnapshot(ctx, ids[0].ID)
		delete(r.m.snaps, ids[0].ID) // when it failed, it may exist or not
		return r.saw(err)
	case "apply":
		if len(ids) == 0 {
			return nil
		}
		snap := ids[len(ids)-1]
		frozen, known := r.m.snaps[snap.ID]
		if !known {
			return nil
		}
		err := r.im.ApplySnapshot(ctx, snap.ID)
		if err != nil {
			r.m.sizes = append(r.m.sizes, snap.DiskSize)
			for i, set := range frozen {
				r.m.now[i] = append(r.m.now[i], set...)
				r.m.since[i] = append(r.m.since[i], set...)
			}
			for i := len(frozen); i < len(r.m.now); i++ {
				r.m.now[i] = append(r.m.now[i], string(zeroSector[:]))
				r.m.since[i] = append(r.m.since[i], string(zeroSector[:]))
			}
			return r.saw(err)
		}
		r.m.sizes = []int64{snap.DiskSize}
		r.m.now = cloneSets(frozen)
		r.m.since = cloneSets(frozen)
	case "resize":
		grown := size + n
		err := r.im.Resize(ctx, grown)
		r.m.grow(grown)
		if err == nil {
			r.m.sizes = nil
		}
		r.m.sizes = append(r.m.sizes, grown)
		return r.saw(err)
	}
	return nil
}

func cloneSets(sets [][]string) [][]string {
	c := make([][]string, len(sets))
	for i := range sets {
		c[i] = slices.Clone(sets[i])
	}
	return c
}

// run does ops with the fault, and verifies what is left after it.
func (r *faultRun) run(ops []op) error {
	for _, o := range ops {
		if err := r.step(o); err != nil {
			return fmt.Errorf("%v: %w", o, err)
		}
	}
	if r.syncAgain && r.fault.Ops&storagetest.OpSync != 0 {
		return errors.New("a flush succeeded after a failed sync (P6)")
	}
	r.disk.Clear()
	closeErr := r.im.Close()
	if closeErr == nil {
		r.m.flushed()
	}
	if err := r.saw(closeErr); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	// What was read before a change and what a punch or an allocation could not
	// do for the host are no loss; all else must have been reported.
	quiet := storagetest.OpRead | storagetest.OpPunch | storagetest.OpAllocate | storagetest.OpSize | storagetest.OpClose
	if r.disk.Hits(r.fault) > 0 && !r.surfaced && r.fault.Ops&^quiet != 0 {
		return errors.New("the injected error surfaced nowhere")
	}
	return r.verify()
}

// verify reopens the image, as the next process does, and compares.
func (r *faultRun) verify() error {
	r.disk.Reopen()
	im, err := qcow2.Open(context.Background(), r.disk, r.c.options(r.mc))
	if err != nil {
		return fmt.Errorf("reopen: %w", err)
	}
	defer im.Close()
	var first string
	result, err := im.Check(context.Background(), qcow2.CheckOptions{Report: func(p qcow2.Problem) {
		if !p.Leak && first == "" {
			first = p.Msg
		}
	}})
	if err != nil {
		return err
	}
	if result.Corruptions+result.CheckErrors > 0 {
		return fmt.Errorf("after reopen: %+v: %s", result, first)
	}
	if !slices.Contains(r.m.sizes, im.Size()) {
		return fmt.Errorf("size is %d, want one of %d", im.Size(), r.m.sizes)
	}
	data := make([]byte, im.Size())
	if _, err := im.ReadAt(data, 0); err != nil {
		return err
	}
	if err := r.m.verify(data, 0, r.m.since); err != nil {
		return fmt.Errorf("after reopen: %w", err)
	}
	for id, frozen := range r.m.snaps {
		o := r.c.options(r.mc)
		o.ReadOnly, o.Snapshot = true, id
		sn, err := qcow2.Open(context.Background(), r.disk.Clone(), o)
		if err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		data := make([]byte, sn.Size())
		_, err = sn.ReadAt(data, 0)
		if err := errors.Join(err, sn.Close()); err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
		if err := r.m.verify(data, 0, frozen); err != nil {
			return fmt.Errorf("snapshot %s: %w", id, err)
		}
	}
	if _, err := im.WriteAt(fill(2048, 42), 0); err != nil {
		return fmt.Errorf("write after reopen: %w", err)
	}
	return im.Flush()
}

var faultsAll = flag.Bool("faults-all", false, "try every cause at every operation in TestFaultAtEveryOperation")

// TestFaultAtEveryOperation fails the n-th read, write, sync, truncate or punch
// of the host file, for every n, once and for good.
func TestFaultAtEveryOperation(t *testing.T) {
	t.Parallel()
	configs := []crashConfig{
		{name: "512", size: 32 << 10, create: qcow2.CreateOptions{ClusterSize: 512}},
		{name: "4k-lazy-punch", size: 128 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 4096, LazyRefcounts: true}},
		{name: "4k-backing", size: 128 << 10, backing: true, create: qcow2.CreateOptions{ClusterSize: 4096, BackingFile: "base", BackingFormat: "raw"}},
		{name: "1k-refcount64-punch", size: 64 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 1024, RefcountBits: 64}},
	}
	kinds := []storagetest.Op{storagetest.OpRead, storagetest.OpWrites, storagetest.OpSync, storagetest.OpTruncate, storagetest.OpPunch | storagetest.OpAllocate}
	for _, c := range configs {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			mc := newCache(t, 64<<10)
			injected, surfaced := 0, 0
			for _, kind := range kinds {
				for _, sticky := range []bool{false, true} {
					for n := 1; ; n++ {
						hits := 0
						for _, f := range faultsAt(kind, n, sticky) {
							h, seen := faultOnce(t, c, mc, f)
							hits += h
							if seen {
								surfaced++
							}
						}
						if hits == 0 {
							break
						}
						injected += hits
					}
				}
			}
			if injected == 0 {
				t.Error("no fault was injected")
			}
			if !t.Failed() {
				t.Logf("%s: %d faults injected, %d runs saw them, all that had to", c.name, injected, surfaced)
			}
		})
	}
}

// faultsAt returns the faults to try at operation n: one, whose cause changes
// with n, or with -faults-all every cause, with and without a short write or
// a sync that drops what it had to write.
func faultsAt(kind storagetest.Op, n int, sticky bool) []*storagetest.Fault {
	causes := []error{syscall.EIO, syscall.ENOSPC, syscall.EINTR, syscall.ESTALE}
	if !*faultsAll {
		return []*storagetest.Fault{{Ops: kind, N: n, Err: causes[n%len(causes)], Sticky: sticky, Short: n%2 == 0, Drop: n%2 == 0}}
	}
	var faults []*storagetest.Fault
	for _, cause := range causes {
		for _, partial := range []bool{false, true} {
			faults = append(faults, &storagetest.Fault{Ops: kind, N: n, Err: cause, Sticky: sticky, Short: partial, Drop: partial})
		}
	}
	return faults
}

// faultOnce runs the operations with one fault and returns how often it hit.
func faultOnce(t *testing.T, c crashConfig, mc *cache.Cache, f *storagetest.Fault) (hits int, surfaced bool) {
	t.Helper()
	disk := newDisk(t, c.size, c.create)
	im, err := qcow2.Open(t.Context(), disk, c.options(mc))
	if err != nil {
		t.Fatal(err)
	}
	r := &faultRun{c: c, mc: mc, disk: disk, im: im, m: newFaultModel(c.size), fault: f}
	if c.backing {
		r.m.put(0, baseContent[:min(c.size, int64(len(baseContent)))], nil)
		r.m.flushed()
	}
	disk.Inject(f)
	if err := r.run(faultOps(c.create.ClusterSize)); err != nil {
		t.Errorf("%v number %d fails with %v (for good: %v, short or drop: %v): %v", f.Ops, f.N, f.Err, f.Sticky, f.Short, err)
		im.Close()
	}
	return disk.Hits(f), r.surfaced
}

// TestFaultInOpenAndCreate fails every operation of Create and Open.
func TestFaultInOpenAndCreate(t *testing.T) {
	t.Parallel()
	good := newDisk(t, 1<<20, qcow2.CreateOptions{ClusterSize: 4096})
	im := openDisk(t, good, qcow2.Options{})
	if _, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, im)
	for n := 1; ; n++ {
		f := &storagetest.Fault{Ops: storagetest.OpAny &^ storagetest.OpClose, N: n, Err: syscall.EIO}
		d := storagetest.NewDisk()
		d.Inject(f)
		err := qcow2.Create(t.Context(), d, 1<<20, qcow2.CreateOptions{ClusterSize: 4096, Preallocation: qcow2.PreallocationMetadata})
		if d.Hits(f) == 0 {
			if err != nil || n == 1 {
				t.Errorf("Create without fault: %v", err)
			}
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("Create with operation %d failing: got %v, want EIO", n, err)
		}
	}
	for n := 1; ; n++ {
		d := good.Clone()
		f := &storagetest.Fault{Ops: storagetest.OpAny &^ storagetest.OpClose, N: n, Err: syscall.EIO}
		d.Inject(f)
		im, err := qcow2.Open(t.Context(), d, qcow2.Options{})
		if d.Hits(f) == 0 {
			if err != nil || n == 1 {
				t.Errorf("Open without fault: %v", err)
			}
			im.Close()
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("Open with operation %d failing: got %v, want EIO", n, err)
			im.Close()
		}
		if d.Closed() {
			t.Errorf("Open that failed closed the file, which it does not own")
		}
	}
}

// TestFullPool writes until the host file system is full: the writer is told,
// everything stays readable and overwritable, and goes on when space returns.
func TestFullPool(t *testing.T) {
	t.Parallel()
	d := newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 4096})
	im := useDisk(t, d, qcow2.Options{})
	d.SetCapacity(d.Allocated() + 1<<20)
	want := make([]byte, 4<<20)
	var full error
	var off int64
	for ; full == nil && off < 4<<20; off += 16 << 10 {
		data := fill(16<<10, uint64(off))
		if _, full = im.WriteAt(data, off); full == nil {
			copy(want[off:], data)
		}
	}
	if !errors.Is(full, syscall.ENOSPC) {
		t.Fatalf("a full pool gives %v, want ENOSPC", full)
	}
	written := off - 16<<10
	got := make([]byte, written)
	if _, err := im.ReadAt(got, 0); err != nil || !bytes.Equal(got, want[:written]) {
		t.Fatalf("a full pool cannot be read: %v, or other bytes", err)
	}
	for at := int64(0); at < written; at += 64 << 10 {
		if _, err := im.WriteAt(fill(4096, 3), at); err != nil {
			t.Fatalf("overwrite at %#x in a full pool: %v", at, err)
		}
		copy(want[at:], fill(4096, 3))
	}
	d.SetCapacity(1 << 40)
	for ; off < 4<<20; off += 16 << 10 {
		data := fill(16<<10, uint64(off))
		if _, err := im.WriteAt(data, off); err != nil {
			t.Fatalf("write after space returned: %v", err)
		}
		copy(want[off:], data)
	}
	if err := im.Flush(); err != nil {
		t.Fatalf("flush after space returned: %v", err)
	}
	at := written
	got = readAll(t, im)
	wantSame(t, "content", got[:at], want[:at])
	wantSame(t, "content", got[at+16<<10:], want[at+16<<10:])
}
