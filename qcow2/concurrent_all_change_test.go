package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"time"

	"csi-qcow2/qcow2"
)

// mayFail lets errors pass that a full host, or narrow refcounts, explain.
func mayFail(what string, err error) error {
	if err == nil || errors.Is(err, syscall.ENOSPC) || errors.Is(err, qcow2.ErrRefcountOverflow) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// change does one structural change.
func (e *everything) change(ctx context.Context, images []*everything, rng *rand.Rand) error {
	switch k := rng.IntN(12); {
	case k < 4: // a snapshot
		return snapshotAll(ctx, []*everything{e}, rng)
	case k == 4:
		return snapshotAll(ctx, images, rng)
	case k < 8:
		return e.deleteOne(ctx, rng)
	case k == 8:
		return e.applyOne(ctx, rng)
	case k == 9:
		if e.v2 {
			return nil
		}
		e.structural.Lock()
		defer e.structural.Unlock()
		e.content.Lock()
		defer e.content.Unlock()
		if len(e.want) > 3*len(e.backing) {
			return nil
		}
		size := int64(len(e.want)) + 512*(1+rng.Int64N(4*e.cluster/512))
		err := e.im.Resize(ctx, size)
		if err == nil {
			e.want = append(e.want, make([]byte, size-int64(len(e.want)))...)
		}
		return mayFail("resize", err)
	case k == 10:
		off := rng.Int64N(e.im.Size())
		_, _, err := e.im.Populate(ctx, off, 4*e.cluster)
		if errors.Is(err, qcow2.ErrOutOfRange) {
			err = nil // became shorter
		}
		return mayFail("populate", err)
	default:
		_, err := e.im.DropBacking(ctx)
		return mayFail("drop the backing file", err)
	}
}

func snapshotAll(ctx context.Context, images []*everything, rng *rand.Rand) error {
	for _, e := range images {
		e.structural.Lock()
		defer e.structural.Unlock()
		if len(e.snapshots) > 4 {
			return nil
		}
	}
	var requests []qcow2.SnapshotRequest
	for _, e := range images {
		requests = append(requests, qcow2.SnapshotRequest{Image: e.im})
	}
	if rng.IntN(3) == 0 { // not of a moment that is known
		s, err := qcow2.CreateSnapshots(ctx, requests)
		if err == nil {
			for i, e := range images {
				e.snapshots = append(e.snapshots, kept{id: s[i].ID})
			}
		}
		return mayFail("snapshot", err)
	}
	if rng.IntN(4) == 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(rng.IntN(3000))*time.Microsecond)
		defer cancel()
	}
	refuse := rng.IntN(8) == 0
	wants := make([][]byte, len(images))
	s, err := qcow2.CreateSnapshotsWithin(ctx, requests, func(cut func()) error {
		for i, e := range images {
			e.content.Lock()
			wants[i] = bytes.Clone(e.want)
		}
		cut()
		for _, e := range images {
			e.content.Unlock()
		}
		if refuse {
			return syscall.ENOSPC
		}
		return nil
	})
	if err == nil {
		for i, e := range images {
			e.snapshots = append(e.snapshots, kept{s[i].ID, wants[i]})
		}
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = nil
	}
	return mayFail("snapshot", err)
}

func (e *everything) deleteOne(ctx context.Context, rng *rand.Rand) error {
	e.structural.Lock()
	defer e.structural.Unlock()
	if len(e.snapshots) == 0 {
		return nil
	}
	i := rng.IntN(len(e.snapshots))
	err := e.im.DeleteSnapshot(ctx, e.snapshots[i].id)
	if err == nil {
		e.snapshots = slices.Delete(e.snapshots, i, i+1)
	}
	return mayFail("delete", err)
}

func (e *everything) applyOne(ctx context.Context, rng *rand.Rand) error {
	e.structural.Lock()
	defer e.structural.Unlock()
	if len(e.snapshots) == 0 {
		return nil
	}
	s := e.snapshots[rng.IntN(len(e.snapshots))]
	if s.want == nil {
		return nil
	}
	e.content.Lock()
	defer e.content.Unlock()
	err := e.im.ApplySnapshot(ctx, s.id)
	if err == nil {
		e.want = bytes.Clone(s.want)
	}
	return mayFail("apply", err)
}
