package volume

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/panics"
	"csi-qcow2/qcow2"
)

// createImage writes a new image, which begins with head, into the new file name
// and makes it durable.
func (p *Pool) createImage(ctx context.Context, name string, size int64, o qcow2.CreateOptions, head []byte, direct bool) error {
	f, err := p.dir.OpenFile(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|directFlag(direct), 0o600)
	if err != nil {
		return err
	}
	file, err := qcow2.NewOSFile(f, qcow2.FileOptions{Direct: direct, Lock: qcow2.LockWrite})
	if err != nil {
		return errors.Join(err, f.Close())
	}
	w := p.wrap(file)
	return errors.Join(qcow2.CreateHead(ctx, w, size, o, head), w.Close())
}

// openDisk opens the image file name below the pool.
func (p *Pool) openDisk(name string, o qcow2.FileOptions) (qcow2.File, error) {
	flag := unix.O_RDWR
	if o.ReadOnly {
		flag = unix.O_RDONLY
	}
	f, err := p.dir.OpenFile(name, flag|directFlag(o.Direct), 0)
	if err != nil {
		return nil, err
	}
	file, err := qcow2.NewOSFile(f, o)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if o.ReadOnly {
		return file, nil
	}
	return p.wrap(file), nil
}

func directFlag(direct bool) int {
	if direct {
		return unix.O_DIRECT
	}
	return 0
}

// wrap puts the test seam around f.
func (p *Pool) wrap(f qcow2.File) qcow2.File {
	if p.opts.wrapFile == nil {
		return f
	}
	return p.opts.wrapFile(f)
}

// caught returns open with its panic as its error: nobody has what was opened by half,
// and an image whose content makes the program panic must not end each process that
// comes, and with it the devices of all volumes. It cannot be opened again by this one.
func caught[K comparable](open func(context.Context, K) (*qcow2.Image, error)) func(context.Context, K) (*qcow2.Image, error) {
	return func(ctx context.Context, k K) (*qcow2.Image, error) {
		return panics.Catch(func() (*qcow2.Image, error) { return open(ctx, k) })
	}
}

// openImage opens the image of the volume id read-write, for all its users, and
// remembers why it could not.
func (p *Pool) openImage(ctx context.Context, id string) (*qcow2.Image, error) {
	im, err := caught(p.openDurably)(ctx, id)
	p.noteFailure(id, err)
	return im, err
}

// openDurably marks the volume id as open and opens its image. An image that was not
// closed is checked first and its leaks are repaired.
func (p *Pool) openDurably(ctx context.Context, id string) (*qcow2.Image, error) {
	e := p.find(id)
	if e == nil {
		return nil, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	}
	if err := p.checkChain(id); err != nil {
		return nil, err
	}
	p.mu.Lock()
	rec, damage := e.rec, e.damage
	p.mu.Unlock()
	if rec == nil {
		return nil, fmt.Errorf("%w: volume %s: %w", ErrDamaged, id, damage)
	}
	unclean := rec.Open
	reverting := rec.Revert != ""
	if unclean && p.opts.ClosedOnly {
		return nil, fmt.Errorf("%w: volume %s was not closed: its node agent has died; start the agent, which has the rest of it", ErrInUse, id)
	}
	file, err := p.openDisk(path.Join(volumeDir(id), diskName), qcow2.FileOptions{Direct: rec.Params.DirectIO, Lock: qcow2.LockWrite})
	if err != nil {
		return nil, err
	}
	// The mark is durable before the first byte of the image can change. With
	// it goes a generation, unless this is a takeover: tables that any other
	// process has in its arena are not for the image as it becomes now.
	generation := rec.Generation
	if !unclean || !p.leftOf(imageID(id, generation)) {
		generation++
		if err := p.updateRecord(e, func(r *volumeRecord) { r.Open, r.Generation = true, generation }); err != nil {
			return nil, errors.Join(err, file.Close())
		}
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{
		Cache: p.opts.Cache, ID: imageID(id, generation), Unclean: unclean,
		OpenBacking: p.openBacking, PassDiscard: rec.Params.Discard, ReclaimAfter: reclaimAfter, Admit: p.admit,
	})
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", id, errors.Join(err, file.Close()))
	}
	if reverting { // a predecessor died on the way
		if err := p.finishRevert(ctx, e, im); err != nil {
			return nil, fmt.Errorf("volume %s: %w", id, errors.Join(err, im.Close()))
		}
		return im, nil
	}
	// The header is the truth when a resize and its record were torn apart.
	if im.Size() != rec.Size {
		if err := p.updateRecord(e, func(r *volumeRecord) { r.Size = im.Size() }); err != nil {
			return nil, fmt.Errorf("volume %s: %w", id, errors.Join(err, im.Close()))
		}
	}
	return im, nil
}

// reclaimAfter is how long space that a guest discarded waits for its next flush.
const reclaimAfter = time.Second

// imageID returns the identity, in the cache, of the image of the volume id in
// one generation.
func imageID(id string, generation uint64) [16]byte {
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64([]byte(id), generation))
	return [16]byte(sum[:16])
}

// leftOf reports whether the cache has something that a killed predecessor left
// of an image.
func (p *Pool) leftOf(image [16]byte) bool {
	if p.opts.Cache == nil {
		return false
	}
	tables, failed := p.opts.Cache.Left(image)
	return tables > 0 || failed
}

// shutImage closes an image that its last user has let go of. Only a close
// without error takes the mark away.
func (p *Pool) shutImage(id string, im *qcow2.Image) error {
	if err := im.Close(); err != nil {
		err = fmt.Errorf("volume %s: close: %w", id, err)
		p.noteFailure(id, err)
		return err
	}
	e := p.find(id)
	if e == nil {
		return nil // removed while it was closing down
	}
	return p.updateRecord(e, func(r *volumeRecord) { r.Open = false })
}

// noteFailure remembers for Health why the image of id could not be used.
func (p *Pool) noteFailure(id string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		delete(p.failures, id)
	} else {
		p.failures[id] = err
	}
}

// checkChain refuses a volume whose chain of clones is a loop, too long or broken.
func (p *Pool) checkChain(id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for depth := 0; ; depth++ {
		e := p.volumes[id]
		switch {
		case e == nil:
			return fmt.Errorf("%w: the chain of clones names volume %s, which does not exist", ErrDamaged, id)
		case e.backing == nil:
			return nil
		case depth >= maxChainDepth:
			return fmt.Errorf("%w: the limit is %d", ErrTooDeep, maxChainDepth)
		}
		id = e.backing.Volume
	}
}

// openBacking is the qcow2.BackingOpener of the images of a pool: the only
// backing files they have are views, and a view is opened as what it shows.
func (p *Pool) openBacking(ctx context.Context, name, format string) (qcow2.Disk, error) {
	v, err := parseBackingName(name)
	if err != nil {
		return nil, err
	}
	if format != "qcow2" {
		return nil, fmt.Errorf("%w: backing file of format %q", ErrDamaged, format)
	}
	return p.useView(ctx, v)
}

// useView opens the snapshot that v shows for one more user.
func (p *Pool) useView(ctx context.Context, v viewRef) (*viewDisk, error) {
	im, err := p.views.acquire(ctx, v)
	if err != nil {
		return nil, err
	}
	release := func() error {
		defer p.wakeReaper() // it may have waited for this, see wasteOf
		return p.views.release(v)
	}
	return &viewDisk{im, release}, nil
}

// A viewDisk is one user's share of an open view.
type viewDisk struct {
	qcow2.Disk
	release func() error
}

// Close lets go of the view.
func (d *viewDisk) Close() error { return d.release() }

// Unwrap returns the image, which all users share: see qcow2.Changed.
func (d *viewDisk) Unwrap() qcow2.Disk { return d.Disk }

// openView opens the internal snapshot that the view v shows.
func (p *Pool) openView(ctx context.Context, v viewRef) (*qcow2.Image, error) {
	if err := p.checkChain(v.Volume); err != nil {
		return nil, err
	}
	p.mu.Lock()
	e := p.volumes[v.Volume]
	going := e == nil || e.going[v.Snapshot]
	direct := !going && e.rec != nil && e.rec.Params.DirectIO
	p.mu.Unlock()
	if going { // see claimWaste
		return nil, fmt.Errorf("%w: snapshot %s is being removed", ErrBusy, v.Snapshot)
	}
	// Its volume may be open read-write: LockShared tolerates that.
	file, err := p.openDisk(path.Join(volumeDir(v.Volume), diskName), qcow2.FileOptions{ReadOnly: true, Direct: direct, Lock: qcow2.LockShared})
	if err != nil {
		return nil, err
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{ReadOnly: true, Snapshot: v.Snapshot, Cache: p.opts.Cache, OpenBacking: p.openBacking})
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", v.Snapshot, errors.Join(err, file.Close()))
	}
	return im, nil
}

func shutView(_ viewRef, im *qcow2.Image) error { return im.Close() }
