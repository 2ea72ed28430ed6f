package volume

import (
	"context"
	"errors"
	"fmt"

	"csi-qcow2/qcow2"
)

// Changed calls visit with the ranges of the snapshot target, from offset off on
// and in ascending order, that may differ from the snapshot base. That is one of
// the same volume, or one of them is of a clone, also a clone of clones, of the
// other's volume. An empty base is zeroes: the ranges are those that hold data.
// size gets the size of target first. The snapshots can be deleted meanwhile;
// their space is given back after the call.
//
// Errors: ErrNotFound, ErrOutOfRange (off), ErrInvalid (snapshots that have
// nothing in common), those of size and visit.
func (p *Pool) Changed(ctx context.Context, base, target string, off int64, size func(int64) error, visit func(off, n int64) error) (err error) {
	var from qcow2.Disk
	e, _, err := p.snapshotRecord(target)
	if err != nil {
		return err
	}
	if base != "" {
		b, _, err := p.snapshotRecord(base)
		if err != nil {
			return err
		}
		if !p.descends(e.id, b.id) && !p.descends(b.id, e.id) {
			return fmt.Errorf("%w: snapshot %s is of volume %s and %s of %s: neither volume is a clone of the other", ErrInvalid, target, e.id, base, b.id)
		}
		d, err := p.useView(ctx, viewRef{b.id, base})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		from = d
	}
	to, err := p.useView(ctx, viewRef{e.id, target})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if off < 0 || off > to.Size() {
		return fmt.Errorf("%w: offset %d of the %d bytes of snapshot %s", ErrOutOfRange, off, to.Size(), target)
	}
	if err := size(to.Size()); err != nil {
		return err
	}
	return qcow2.Changed(ctx, from, to, off, visit)
}

// descends reports whether the volume id is ancestor or a clone of it, at any
// distance.
func (p *Pool) descends(id, ancestor string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for range maxChainDepth + 1 {
		if id == ancestor {
			return true
		}
		e := p.volumes[id]
		if e == nil || e.backing == nil {
			return false
		}
		id = e.backing.Volume
	}
	return false
}
