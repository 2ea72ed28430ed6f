package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A world is a process that can be killed: all that a successor would find is changed
// after a step.
type world struct {
	images []*everything
	arena  string
	mu     sync.RWMutex // held alone while nothing may change
}

func (w *world) step() {
	w.mu.RLock()
	defer w.mu.RUnlock()
}

// keptFile is a simulated file that several images have open. Some writes of guest
// data fail if it says so, half done.
type keptFile struct {
	*storagetest.Disk
	step  func()
	fails func() bool
}

func (*keptFile) Close() error { return nil }

func (f *keptFile) Datasync() error             { f.step(); return f.Disk.Datasync() }
func (f *keptFile) Truncate(size int64) error   { f.step(); return f.Disk.Truncate(size) }
func (f *keptFile) Punch(off, n int64) error    { f.step(); return f.Disk.Punch(off, n) }
func (f *keptFile) Allocate(off, n int64) error { f.step(); return f.Disk.Allocate(off, n) }

func (f *keptFile) WriteAt(p []byte, off int64) (int, error) {
	f.step()
	if f.fails != nil && f.ofData(off) && f.fails() {
		n, _ := f.Disk.WriteAt(p[:len(p)/2], off)
		return n, syscall.ENOSPC
	}
	return f.Disk.WriteAt(p, off)
}

func (f *keptFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	f.step()
	if f.fails != nil && f.fails() {
		n, _ := f.Disk.WritevAt(bufs[:2], off)
		return n, syscall.ENOSPC
	}
	return f.Disk.WritevAt(bufs, off)
}

// ofData reports whether the caller writes guest data, neither tables nor the header.
func (f *keptFile) ofData(off int64) bool {
	if off < 512 {
		return false
	}
	var pcs [16]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs[:])])
	for {
		frame, more := frames.Next()
		if strings.Contains(frame.Function, "/cache.") {
			return false
		}
		if !more {
			return true
		}
	}
}

// everythingCache is the budget of the cache in bytes.
const everythingCache = 64 << 10

// kill lets a successor go on with what a SIGKILL would leave now: all that was
// acknowledged is there, and nothing is corrupt.
func (w *world) kill(ctx context.Context, rng *rand.Rand, dir string) error {
	time.Sleep(time.Duration(rng.IntN(3000)) * time.Microsecond)
	type left struct {
		d     *storagetest.Disk
		want  []byte // nil if not known
		doing map[int64]doing
		snaps []kept
	}
	lefts := make([]left, len(w.images))
	w.mu.Lock()
	for i, e := range w.images { // first what was acknowledged, then what is there
		l := &lefts[i]
		if e.content.TryRLock() {
			e.ackMu.Lock()
			l.want, l.doing = bytes.Clone(e.want), maps.Clone(e.doing)
			e.ackMu.Unlock()
			e.content.RUnlock()
		}
		if e.structural.TryLock() {
			l.snaps = slices.Clone(e.snapshots)
			e.structural.Unlock()
		}
	}
	mem, err := os.ReadFile(w.arena)
	for i, e := range w.images {
		lefts[i].d = e.d.Clone()
	}
	w.mu.Unlock()
	path := filepath.Join(dir, "arena")
	if err == nil {
		err = os.WriteFile(path, mem, 0o600)
	}
	if err != nil {
		return err
	}
	defer os.Remove(path)
	c, err := cache.New(cache.Options{Bytes: everythingCache, Path: path})
	if err != nil {
		return fmt.Errorf("arena after a kill: %w", err)
	}
	defer c.Close()
	open := make([]*qcow2.Image, len(w.images))
	for i, e := range w.images { // all, before one needs the room of another
		var err error
		if open[i], err = qcow2.Open(ctx, lefts[i].d, e.options(qcow2.Options{Cache: c, ID: e.id, Unclean: true})); err != nil {
			return fmt.Errorf("open after a kill: %w", err)
		}
		defer open[i].Close()
	}
	for i, e := range w.images {
		l := &lefts[i]
		err := e.checkTakenOver(ctx, open[i], l.want, l.doing)
		for _, s := range l.snaps {
			if err == nil && s.want != nil {
				err = e.checkTakenOverSnapshot(ctx, l.d, s)
			}
		}
		if err := errors.Join(err, open[i].Close()); err != nil {
			return fmt.Errorf("after a kill: %w", err)
		}
	}
	return nil
}

func (e *everything) checkTakenOver(ctx context.Context, im *qcow2.Image, want []byte, doing map[int64]doing) error {
	r, err := im.Check(ctx, qcow2.CheckOptions{})
	if err == nil && !r.Clean() {
		err = fmt.Errorf("%d corruptions, %d leaks", r.Corruptions, r.Leaks)
	}
	if err != nil || want == nil {
		return err
	}
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil {
		return err
	}
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(want))
	}
	for _, d := range doing {
		for i, now := range d.now {
			if at := d.off + int64(i); got[at] == now {
				want[at] = now
			}
		}
	}
	if !bytes.Equal(got, want) {
		return errors.New("what was acknowledged is not there")
	}
	return nil
}

func (e *everything) checkTakenOverSnapshot(ctx context.Context, d *storagetest.Disk, s kept) error {
	sn, err := qcow2.Open(ctx, &keptFile{d, func() {}, nil}, e.options(qcow2.Options{ReadOnly: true, Snapshot: s.id}))
	if err != nil {
		return err
	}
	defer sn.Close()
	got := make([]byte, sn.Size())
	if _, err := sn.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, s.want) {
		return fmt.Errorf("snapshot %s is not what it was", s.id)
	}
	return nil
}

// crash opens what a power loss, or a kill without the cache, leaves of the image now.
func (e *everything) crash(ctx context.Context, rng *rand.Rand) error {
	if e.v2 {
		return nil // no dirty bit: a snapshot is not crash-safe
	}
	d := e.d.CrashClone(rng)
	im, err := qcow2.Open(ctx, d, e.options(qcow2.Options{Unclean: true}))
	if err != nil {
		return fmt.Errorf("open after a power loss: %w", err)
	}
	defer im.Close()
	r, err := im.Check(ctx, qcow2.CheckOptions{})
	if err == nil && (r.Corruptions > 0 || r.CheckErrors > 0 || r.Leaks > 0) {
		err = fmt.Errorf("after a power loss: %d corruptions, %d leaks", r.Corruptions, r.Leaks)
	}
	return err
}
