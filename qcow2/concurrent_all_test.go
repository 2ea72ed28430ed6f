package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

var everythingFlag = flag.Int("everything", 1, "how many times longer TestConcurrentEverything runs")

// TestConcurrentEverything lets all that changes an image happen at once to two
// images of one tiny cache: all kinds of requests, snapshots of one and of both, applied and
// deleted, growth, flattening, usage and changed ranges, on a host that refuses space now
// and then. What is read is always what was written, in snapshots too, and in what a kill or
// a power loss leaves at any moment.
func TestConcurrentEverything(t *testing.T) {
	rng := newRand(t)
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512, RefcountBits: 1},
		{ClusterSize: 512, RefcountBits: 64},
		{ClusterSize: 1024, RefcountBits: 2},
		{ClusterSize: 4096, RefcountBits: 4, CompressionType: "zstd"},
		{ClusterSize: 4096, RefcountBits: 16, Version: 2},
		{ClusterSize: 16384, RefcountBits: 8},
		{ClusterSize: 65536, RefcountBits: 16},
		{ClusterSize: 2 << 20, RefcountBits: 32},
	} {
		t.Run(fmt.Sprintf("%d/%d", o.ClusterSize, o.RefcountBits), func(t *testing.T) {
			noLeaks(t)
			concurrentEverything(t, o, rng.Uint64())
		})
	}
}

// everything is what TestConcurrentEverything does to one image.
type everything struct {
	im      *qcow2.Image
	d       *storagetest.Disk
	id      [16]byte
	quiet   *keptFile // of those who only read
	backing []byte
	cluster int64
	v2      bool
	moody   atomic.Bool // the host refuses space now and then

	// content is held alone to change the size or all of the content at once, and
	// to cut; shared by a request and what it changes in want.
	content    sync.RWMutex
	want       []byte
	snapshots  []kept // guarded by structural
	structural sync.Mutex

	ackMu sync.Mutex      // held by a worker over a change of its own part of want, and of doing
	doing map[int64]doing // by worker; guarded by ackMu
}

// A doing is a request that was not acknowledged yet.
type doing struct {
	off int64
	now []byte // what is there if it is done
}

// A kept snapshot has this content.
type kept struct {
	id   string
	want []byte // nil if not known
}

func newEverything(t *testing.T, o qcow2.CreateOptions, clusters int64, rng *rand.Rand) *everything {
	size := clusters * o.ClusterSize
	e := &everything{doing: map[int64]doing{}, cluster: o.ClusterSize, v2: o.Version == 2}
	e.want = make([]byte, size)
	if !e.v2 {
		o.BackingFile, o.BackingFormat = "backing", "raw"
		e.backing = fill(size/2+512*rng.Int64N(3), rng.Uint64())
		clear(e.backing[size/8 : size/4])
		copy(e.want, e.backing)
	}
	e.d = newDisk(t, size, o)
	e.quiet = &keptFile{e.d, func() {}, nil}
	return e
}

func (e *everything) options(o qcow2.Options) qcow2.Options {
	o.OpenBacking = func(context.Context, string, string) (qcow2.Disk, error) {
		d := storagetest.NewDisk()
		if _, err := d.WriteAt(e.backing, 0); err != nil {
			return nil, err
		}
		return qcow2.OpenRaw(d, qcow2.RawOptions{ReadOnly: true})
	}
	return o
}

func concurrentEverything(t *testing.T, o qcow2.CreateOptions, seed uint64) {
	const workers = 4
	rng := rand.New(rand.NewPCG(seed, 99))
	clusters := int64(workers * 4 * 24)
	if o.ClusterSize == 2<<20 {
		clusters = workers * 4
	}
	w := &world{arena: filepath.Join(scratch(t), "arena")}
	mc, err := cache.New(cache.Options{Bytes: everythingCache, Path: w.arena, OnStore: w.step})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mc.Close() })
	var images []*everything
	for i := range 2 {
		e := newEverything(t, o, clusters, rng)
		e.id = [16]byte{1: byte(i + 1)}
		var calls atomic.Uint64
		opts := e.options(qcow2.Options{PassDiscard: true, Cache: mc, ID: e.id, ReclaimAfter: time.Millisecond,
			Admit: func(int64) error {
				if e.moody.Load() && calls.Add(1)%97 == 0 {
					return syscall.ENOSPC
				}
				return nil
			}})
		im, err := qcow2.Open(t.Context(), &keptFile{e.d, w.step, func() bool { return e.moody.Load() && calls.Add(1)%89 == 0 }}, opts)
		if err != nil {
			t.Fatal(err)
		}
		e.im = im
		e.d.RecordTail()
		e.moody.Store(true)
		images = append(images, e)
		t.Cleanup(func() { im.Close() })
	}
	w.images = images
	dir := scratch(t)
	stop := make(chan struct{})
	var others, writers sync.WaitGroup
	loop := func(id uint64, f func(rng *rand.Rand) error) {
		others.Go(func() { // ends when stop is closed
			for rng := rand.New(rand.NewPCG(seed, id)); ; {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(rng); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if o.Version != 2 { // no dirty bit: a snapshot is not crash-safe there
		loop(4000, func(rng *rand.Rand) error { return w.kill(t.Context(), rng, dir) })
	}
	for i, e := range images {
		loop(uint64(1000+i), func(rng *rand.Rand) error { return e.change(t.Context(), images, rng) })
		loop(uint64(2000+i), func(rng *rand.Rand) error { return e.look(t.Context(), rng) })
		loop(uint64(3000+i), func(rng *rand.Rand) error { return e.trouble(rng) })
		for k := range int64(workers) {
			rng := rand.New(rand.NewPCG(seed, uint64(i)*workers+uint64(k)))
			writers.Go(func() {
				n := *everythingFlag * scaled(800)
				if o.ClusterSize > 4096 {
					n = n * 4096 / int(o.ClusterSize)
				}
				n = max(n, 5)
				for range n {
					if err := e.request(rng, k, workers); err != nil {
						t.Errorf("writer %d of image %d: %v", k, i, err)
						return
					}
				}
			})
		}
	}
	writers.Wait()
	close(stop)
	others.Wait()
	for _, e := range images {
		e.d.Clear()
		e.moody.Store(false)
	}
	if t.Failed() {
		return
	}
	for _, e := range images {
		e.finish(t)
	}
}

// request does one request of worker w of n, on runs of 4 clusters of which every
// n-th is its own.
func (e *everything) request(rng *rand.Rand, w, n int64) error {
	e.content.RLock()
	defer e.content.RUnlock()
	run := 4 * e.cluster
	runs := int64(len(e.want)) / run / n
	base := (rng.Int64N(runs)*n + w) * run
	at := rng.Int64N(run)
	if rng.IntN(2) == 0 {
		at -= at % e.cluster
	}
	off := base + at
	length := min(1+rng.Int64N(run), run-at)
	if rng.IntN(2) == 0 {
		length = min(max(length-length%e.cluster, e.cluster), run-at)
	}
	mine := e.want[off : off+length]
	now := bytes.Clone(mine)
	var err error
	switch rng.IntN(9) {
	case 0, 1, 2:
		copy(now, fill(length, rng.Uint64()))
		e.begin(w, off, now)
		_, err = e.im.WriteAt(now, off)
	case 3, 4:
		off, length = base+at-at%e.cluster, e.cluster
		mine = e.want[off : off+length]
		now = bytes.Repeat([]byte{byte(rng.Uint32())}, int(length))
		e.begin(w, off, now)
		err = e.im.WriteCompressed(now, off)
	case 5:
		if e.v2 && e.backing != nil {
			return nil
		}
		first, end := (off+e.cluster-1)/e.cluster*e.cluster, (off+length)/e.cluster*e.cluster
		if first < end {
			clear(now[first-off : end-off])
		}
		e.begin(w, off, now)
		err = e.im.Discard(off, length)
	case 6:
		clear(now)
		e.begin(w, off, now)
		err = e.im.WriteZeroes(off, length, rng.IntN(2) == 0)
	case 7:
		if err := e.im.Flush(); err != nil {
			return err
		}
		fallthrough
	case 8:
		got := make([]byte, length)
		if _, err := e.im.ReadAt(got, off); err != nil {
			return err
		}
		if !bytes.Equal(got, mine) {
			return fmt.Errorf("other bytes than were written at %#x, %d bytes", off, length)
		}
		return nil
	}
	if err == nil {
		e.acknowledge(w, mine, now)
		return nil
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	got := make([]byte, length) // some of it may be there
	if _, err := e.im.ReadAt(got, off); err != nil {
		return err
	}
	for i := range got {
		if got[i] != mine[i] && got[i] != now[i] {
			return fmt.Errorf("a request that failed left other bytes at %#x", off+int64(i))
		}
	}
	e.acknowledge(w, mine, got)
	return nil
}

func (e *everything) begin(w, off int64, now []byte) {
	e.ackMu.Lock()
	defer e.ackMu.Unlock()
	e.doing[w] = doing{off, now}
}

func (e *everything) acknowledge(w int64, mine, now []byte) {
	e.ackMu.Lock()
	defer e.ackMu.Unlock()
	copy(mine, now)
	delete(e.doing, w)
}

// look does one thing that reads.
func (e *everything) look(ctx context.Context, rng *rand.Rand) error {
	switch rng.IntN(7) {
	case 0:
		u, err := e.im.SnapshotUsage(ctx)
		if err == nil && (u.Total < u.Metadata || u.Metadata <= 0) {
			return fmt.Errorf("usage %+v", u)
		}
		return mayFail("usage", err)
	case 1, 2:
		return e.lookAtSnapshot(ctx, rng)
	case 3:
		return e.crash(ctx, rng)
	case 4:
		if rng.IntN(4) > 0 {
			return nil
		}
		r, err := e.im.Check(ctx, qcow2.CheckOptions{})
		if err == nil && (r.Corruptions > 0 || r.CheckErrors > 0) {
			err = fmt.Errorf("%d corruptions", r.Corruptions)
		}
		return mayFail("check", err)
	}
	size := e.im.Size()
	off := rng.Int64N(size)
	n := min(1+rng.Int64N(8*e.cluster), size-off)
	_, err := e.im.ReadAt(make([]byte, n), off)
	if err == nil {
		_, err = e.im.BlockStatus(ctx, off, n)
	}
	if errors.Is(err, qcow2.ErrOutOfRange) {
		err = nil
	}
	return err
}

func (e *everything) lookAtSnapshot(ctx context.Context, rng *rand.Rand) error {
	e.structural.Lock()
	defer e.structural.Unlock()
	if len(e.snapshots) == 0 {
		return nil
	}
	open := func(s kept) (*qcow2.Image, error) {
		return qcow2.Open(ctx, e.quiet, e.options(qcow2.Options{ReadOnly: true, Snapshot: s.id}))
	}
	s := e.snapshots[rng.IntN(len(e.snapshots))]
	a, err := open(s)
	if err != nil {
		return fmt.Errorf("open a snapshot: %w", err)
	}
	defer a.Close()
	got := make([]byte, a.Size())
	if _, err := a.ReadAt(got, 0); err != nil {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	if s.want != nil && !bytes.Equal(got, s.want) {
		return fmt.Errorf("snapshot %s has other bytes than the disk when it was taken", s.id)
	}
	// What is not reported as changed is the same.
	old := e.snapshots[rng.IntN(len(e.snapshots))]
	b, err := open(old)
	if err != nil {
		return fmt.Errorf("open a snapshot: %w", err)
	}
	defer b.Close()
	was := make([]byte, b.Size())
	if _, err := b.ReadAt(was, 0); err != nil {
		return fmt.Errorf("read a snapshot: %w", err)
	}
	was = append(was, make([]byte, max(0, len(got)-len(was)))...)
	err = qcow2.Changed(ctx, b, a, 0, func(off, n int64) error {
		copy(was[off:off+n], got[off:])
		return nil
	})
	if err == nil && !bytes.Equal(was[:len(got)], got) {
		err = fmt.Errorf("between snapshots %s and %s more has changed than is reported", old.id, s.id)
	}
	return err
}

// trouble lets the host refuse space for a moment.
func (e *everything) trouble(rng *rand.Rand) error {
	ops := []storagetest.Op{storagetest.OpTruncate, storagetest.OpAllocate, storagetest.OpPunch}
	e.d.Inject(&storagetest.Fault{Ops: ops[rng.IntN(len(ops))], N: 1 + rng.IntN(4), Err: syscall.ENOSPC, Sticky: rng.IntN(3) == 0})
	time.Sleep(time.Duration(rng.IntN(500)) * time.Microsecond)
	e.d.Clear()
	time.Sleep(time.Duration(rng.IntN(2000)) * time.Microsecond)
	return nil
}

// finish verifies the image, flattens it, and verifies it without snapshots.
func (e *everything) finish(t *testing.T) {
	t.Helper()
	wantSame(t, "the disk", readAll(t, e.im), e.want)
	checkClean(t, e.im, false)
	for _, s := range e.snapshots {
		if err := e.im.DeleteSnapshot(t.Context(), s.id); err != nil {
			t.Fatal(err)
		}
	}
	for off := int64(0); off < e.im.Size(); {
		next, _, err := e.im.Populate(t.Context(), off, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		off = next
	}
	if gone, err := e.im.DropBacking(t.Context()); err != nil || !gone {
		t.Fatalf("DropBacking() = %t, %v", gone, err)
	}
	wantSame(t, "the disk without its backing file", readAll(t, e.im), e.want)
	checkClean(t, e.im, false)
	mustClose(t, e.im)
	verifyDisk(t, e.d)
}
