package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"csi-qcow2/cache"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A crashConfig is an image for crash tests: small, so that every table grows.
type crashConfig struct {
	name    string
	size    int64
	create  qcow2.CreateOptions
	backing bool
	pass    bool
	prelude int64 // bytes written before the recording starts
}

// baseContent is the backing file of images that have one.
var baseContent = fill(96<<10, 77)

func (c crashConfig) options(mc *cache.Cache) qcow2.Options {
	o := qcow2.Options{Cache: mc, PassDiscard: c.pass}
	if c.backing {
		o.OpenBacking = func(context.Context, string, string) (qcow2.Disk, error) {
			d := storagetest.NewDisk()
			if _, err := d.WriteAt(baseContent, 0); err != nil {
				return nil, err
			}
			return qcow2.OpenRaw(d, qcow2.RawOptions{ReadOnly: true})
		}
	}
	return o
}

// A history is what was asked of an image while its host file was recorded.
type history struct {
	c       crashConfig
	log     *storagetest.Log
	steps   []step
	initial view
}

// A step is one request: when it ran, counted in events of the log, and what
// the image held after it.
type step struct {
	op         op
	start, end int
	after      view
	durable    bool // all of after is durable when it returns
	sized      bool // the virtual size is durable when it returns
	whole      bool // a crash during it leaves the state before or after, no mixture
}

// A view is the content of an image: the active state and the snapshots by ID.
type view struct {
	bytes []byte
	snaps map[string][]byte
}

func (v view) clone() view {
	snaps := make(map[string][]byte, len(v.snaps))
	for id, b := range v.snaps {
		snaps[id] = b // never changed
	}
	return view{bytes.Clone(v.bytes), snaps}
}

// record runs ops on a new image and returns its history. Errors are reported
// as errors, because a power loss is not what failed then.
func record(ctx context.Context, c crashConfig, mc *cache.Cache, ops []op) (*history, error) {
	d := storagetest.NewDisk()
	o := c.create
	if c.backing {
		o.BackingFile, o.BackingFormat = "base", "raw"
	}
	if err := qcow2.Create(ctx, d, c.size, o); err != nil {
		return nil, err
	}
	im, err := qcow2.Open(ctx, d, c.options(mc))
	if err != nil {
		return nil, err
	}
	h := &history{c: c}
	defer func() { im.Close() }()
	now := view{bytes: make([]byte, c.size), snaps: map[string][]byte{}}
	if c.backing {
		copy(now.bytes, baseContent)
	}
	if c.prelude > 0 {
		data := fill(c.prelude, 5)
		if _, err := im.WriteAt(data, 0); err != nil {
			return nil, err
		}
		copy(now.bytes, data)
	}
	if err := im.Flush(); err != nil {
		return nil, err
	}
	h.initial = now.clone()
	h.log = d.Record()
	for _, o := range ops {
		s := step{op: o, start: d.Position()}
		im, err = s.do(ctx, c, mc, d, im, &now)
		if err != nil {
			return nil, fmt.Errorf("%v: %w", o, err)
		}
		s.end, s.after = d.Position(), now.clone()
		h.steps = append(h.steps, s)
	}
	return h, nil
}

// do runs the step and changes now as it says.
func (s *step) do(ctx context.Context, c crashConfig, mc *cache.Cache, d *storagetest.Disk, im *qcow2.Image, now *view) (*qcow2.Image, error) {
	o := s.op
	size := int64(len(now.bytes))
	off := o.off % size
	n := min(o.n, size-off)
	ids := im.Snapshots()
	switch o.kind {
	case "write":
		data := fill(n, o.arg)
		if _, err := im.WriteAt(data, off); err != nil {
			return im, err
		}
		copy(now.bytes[off:], data)
	case "zero", "unmap":
		if err := im.WriteZeroes(off, n, o.kind == "unmap"); err != nil {
			return im, err
		}
		clear(now.bytes[off : off+n])
	case "discard":
		if err := im.Discard(off, n); err != nil {
			return im, err
		}
		if _, err := im.ReadAt(now.bytes[off:off+n], off); err != nil {
			return im, err
		}
	case "flush":
		s.durable = true
		return im, im.Flush()
	case "snap":
		made, err := im.CreateSnapshot(ctx, qcow2.Snapshot{Name: "s"})
		if errors.Is(err, qcow2.ErrRefcountOverflow) {
			return im, nil
		}
		if err != nil {
			return im, err
		}
		now.snaps[made.ID] = bytes.Clone(now.bytes)
	case "delsnap":
		if len(ids) == 0 {
			return im, nil
		}
		id := ids[o.arg%uint64(len(ids))].ID
		if err := im.DeleteSnapshot(ctx, id); err != nil {
			return im, err
		}
		delete(now.snaps, id)
	case "apply":
		if len(ids) == 0 {
			return im, nil
		}
		id := ids[o.arg%uint64(len(ids))].ID
		s.durable, s.sized, s.whole = true, true, true
		if err := im.ApplySnapshot(ctx, id); err != nil {
			return im, err
		}
		now.bytes = bytes.Clone(now.snaps[id])
	case "resize":
		grown := size + o.n
		if grown > 3*c.size || c.create.Version == 2 && len(ids) > 0 {
			return im, nil
		}
		s.sized = true
		if err := im.Resize(ctx, grown); err != nil {
			return im, err
		}
		now.bytes = append(now.bytes, make([]byte, im.Size()-size)...)
	case "reopen":
		s.durable, s.sized = true, true
		if err := im.Close(); err != nil {
			return im, err
		}
		d.Reopen()
		return qcow2.Open(ctx, d, c.options(mc))
	default:
		return im, fmt.Errorf("unknown operation")
	}
	return im, nil
}

// judge returns what is wrong with the content of im, which was opened after a
// power loss behind event at.
func (h *history) judge(ctx context.Context, im *qcow2.Image, disk *storagetest.Disk, mc *cache.Cache, at int) error {
	base, sizes := h.initial, map[int64]bool{int64(len(h.initial.bytes)): true}
	var pending []step // what may have reached the file beyond base
	for _, s := range h.steps {
		if s.start >= at && s.end > at {
			break
		}
		done := s.end <= at
		if done && s.durable {
			base, pending = s.after, pending[:0]
		} else {
			pending = append(pending, s)
		}
		if done && s.sized {
			clear(sizes)
		}
		sizes[int64(len(s.after.bytes))] = true
	}
	if !sizes[im.Size()] {
		return fmt.Errorf("the virtual size is %d, want one of %v", im.Size(), sizes)
	}
	got := make([]byte, im.Size())
	if _, err := im.ReadAt(got, 0); err != nil {
		return err
	}
	if n := len(pending); n > 0 && pending[n-1].whole {
		if bytes.Equal(got, pending[n-1].after.bytes) {
			return h.judgeSnapshots(ctx, im, disk, mc, at)
		}
		pending = pending[:n-1]
	}
	if err := judgeSectors(got, base, pending); err != nil {
		return err
	}
	return h.judgeSnapshots(ctx, im, disk, mc, at)
}

// judgeSectors compares each sector with the durable one and those written later (P2).
func judgeSectors(got []byte, base view, pending []step) error {
	for off := 0; off < len(got); off += 512 {
		sector := got[off : off+512]
		ok := bytes.Equal(sector, sectorOf(base.bytes, off))
		for i := 0; i < len(pending) && !ok; i++ {
			ok = bytes.Equal(sector, sectorOf(pending[i].after.bytes, off))
		}
		if !ok {
			return fmt.Errorf("sector %#x is % x…, want the flushed % x… or one of %d later versions",
				off, sector[:8], sectorOf(base.bytes, off)[:8], len(pending))
		}
	}
	return nil
}

var zeroSector [512]byte

func sectorOf(b []byte, off int) []byte {
	if off >= len(b) {
		return zeroSector[:]
	}
	return b[off : off+512]
}

// judgeSnapshots verifies that the snapshots are those that must and may exist,
// and hold what they were made of (P4).
func (h *history) judgeSnapshots(ctx context.Context, im *qcow2.Image, disk *storagetest.Disk, mc *cache.Cache, at int) error {
	must, may := h.initial.snaps, h.initial.snaps
	for _, s := range h.steps {
		if s.end <= at {
			must, may = s.after.snaps, s.after.snaps
		} else if s.start < at {
			before := must
			must, may = map[string][]byte{}, map[string][]byte{}
			for id, b := range before {
				if s.after.snaps[id] != nil {
					must[id] = b
				}
				may[id] = b
			}
			for id, b := range s.after.snaps {
				may[id] = b
			}
			break
		}
	}
	exist := map[string]bool{}
	for _, s := range im.Snapshots() {
		exist[s.ID] = true
		want := may[s.ID]
		if want == nil {
			return fmt.Errorf("snapshot %s should not exist", s.ID)
		}
		o := h.c.options(mc)
		o.ReadOnly, o.Snapshot = true, s.ID
		sn, err := qcow2.Open(ctx, disk.Clone(), o)
		if err != nil {
			return fmt.Errorf("open snapshot %s: %w", s.ID, err)
		}
		got := make([]byte, sn.Size())
		_, err = sn.ReadAt(got, 0)
		if err := errors.Join(err, sn.Close()); err != nil {
			return fmt.Errorf("read snapshot %s: %w", s.ID, err)
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("snapshot %s has changed", s.ID)
		}
	}
	for id := range must {
		if !exist[id] {
			return fmt.Errorf("snapshot %s is lost", id)
		}
	}
	return nil
}

// crashOps returns n operations of a few clusters each, sector-aligned as a
// guest's are.
func crashOps(rng *rand.Rand, n int, clusterSize int64, snapshots bool) []op {
	kinds := []string{"write", "write", "write", "write", "flush", "flush", "discard", "zero", "unmap", "reopen", "resize"}
	if snapshots {
		kinds = append(kinds, "snap", "snap", "delsnap", "apply")
	}
	ops := make([]op, n)
	for i := range ops {
		ops[i] = op{kind: kinds[rng.IntN(len(kinds))], off: rng.Int64N(1<<40) &^ 511, arg: uint64(rng.Uint32())}
		ops[i].n = (1 + rng.Int64N(2*clusterSize)) &^ 511
		switch {
		case rng.IntN(3) == 0:
			ops[i].off &^= clusterSize - 1
			ops[i].n = clusterSize * (1 + rng.Int64N(4))
		case ops[i].n == 0:
			ops[i].n = 512
		}
	}
	return ops
}
