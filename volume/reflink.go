package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// A volume of CloneReflink is a file of its own that shares blocks with its
// source's file, as far as the host's file system can:
//
//  1. The snapshot to clone is in the source's image, durably: it was there, or
//     it was taken now and hidden.
//  2. The new file shares all blocks of the source's file. As the source may be
//     written meanwhile, its active state is what a crash would leave at that
//     moment; the snapshot is whole.
//  3. The new image is recovered as after a crash, reverted to the snapshot, and
//     loses all snapshots. Then the volume is published.
//
// Data is neither read nor written, metadata is read once. What dies on the way
// leaves files in incoming/ and, of the clone of a volume, a hidden snapshot.

// mayReflink reports whether a volume with the parameters q is to be a reflink
// of the image of owner. Its error says why CloneReflink is impossible.
func (p *Pool) mayReflink(owner *entry, q Params) (bool, error) {
	if q.CloneMode != CloneReflink && q.CloneMode != CloneAuto {
		return false, nil
	}
	err := p.checkReflink(owner, q)
	if errors.Is(err, ErrInvalid) && q.CloneMode == CloneAuto {
		return false, nil
	}
	return err == nil, err
}

func (p *Pool) checkReflink(owner *entry, q Params) error {
	p.mu.Lock()
	rec, damage := owner.rec, owner.damage
	p.mu.Unlock()
	if rec == nil {
		return fmt.Errorf("%w: volume %s: %w", ErrDamaged, owner.id, damage)
	}
	if source := rec.Params.ClusterSize; source != q.ClusterSize {
		return fmt.Errorf("%w: parameter cloneMode=reflink keeps the source's clusterSize, %d bytes, and %d is asked for; use cloneMode=auto or linked",
			ErrInvalid, source, q.ClusterSize)
	}
	return p.probeReflink()
}

// probeReflink reports with ErrInvalid that the host's file system shares no
// blocks between files. It tries.
func (p *Pool) probeReflink() (err error) {
	var files [2]*os.File
	for i := range files {
		f, err := p.dir.OpenScratch(incomingDir)
		if err != nil {
			return err
		}
		defer f.Close()
		files[i] = f
	}
	if _, err := files[0].Write(make([]byte, 4096)); err != nil {
		return spaceError(err)
	}
	return reflink(files[1], files[0])
}

// reflink makes dst, an empty file, share the blocks of src. ErrInvalid says that
// their file system cannot.
func reflink(dst, src *os.File) error {
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS):
		return errNoReflink(err)
	case err != nil:
		return spaceError(fmt.Errorf("share the blocks of %q: %w", src.Name(), err))
	}
	return nil
}

func errNoReflink(err error) error {
	return fmt.Errorf("%w: parameter cloneMode=reflink: the pool's file system cannot share blocks between files (%v); use XFS or btrfs, on NFS 4.2 too, or cloneMode=auto, copy or linked", ErrInvalid, err)
}

// createReflink makes the volume of rec from the snapshot snap of owner. The
// caller holds the ID locks of both.
func (p *Pool) createReflink(ctx context.Context, rec volumeRecord, owner *entry, snap snapshotRecord) (Volume, error) {
	if snap.Hidden {
		defer p.wakeReaper() // it has no dependent, whatever comes
	}
	// The copy is an overlay if its source is, of the same view: nobody may
	// remove that before the copy's own header keeps it.
	backing, release := p.holdBacking(owner)
	defer release()
	return p.build(ctx, rec, func(ctx context.Context, name string) (*viewRef, error) {
		if err := p.reflinkImage(owner.id, name); err != nil {
			return nil, err
		}
		linked, err := p.stripImage(ctx, name, snap.ID, rec.Size)
		if !linked { // the copier may have made the source independent meanwhile
			backing = nil
		}
		return backing, err
	})
}

// holdBacking counts a dependent of the view that e's image is an overlay of, nil
// for none, until release is called.
func (p *Pool) holdBacking(e *entry) (backing *viewRef, release func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e.backing == nil {
		return nil, func() {}
	}
	hold := &entry{backing: e.backing}
	p.countDependent(hold, 1)
	return e.backing, func() {
		p.mu.Lock()
		p.countDependent(hold, -1)
		p.mu.Unlock()
		p.wakeReaper()
	}
}

// reflinkImage makes the new file name share the blocks of the image of the volume id.
func (p *Pool) reflinkImage(id, name string) (err error) {
	src, err := p.dir.OpenFile(path.Join(volumeDir(id), diskName), unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	// Writers of the source wait while its blocks are shared: what is dirty is
	// written back before, not then.
	if err := unix.Fdatasync(int(src.Fd())); err != nil {
		return err
	}
	dst, err := p.dir.OpenFile(name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Close()) }()
	if err := reflink(dst, src); err != nil {
		return err
	}
	return dst.Sync()
}

// stripImage makes the image file name what its snapshot shows, size bytes large
// and without snapshots. linked reports whether it has a backing file.
func (p *Pool) stripImage(ctx context.Context, name, snapshot string, size int64) (linked bool, err error) {
	file, err := p.openDisk(name, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		return false, err
	}
	im, err := qcow2.Open(ctx, file, qcow2.Options{Cache: p.opts.Cache, Unclean: true, OpenBacking: p.openBacking, PassDiscard: true})
	if err != nil {
		return false, errors.Join(err, file.Close())
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	if err := im.ApplySnapshot(ctx, snapshot); err != nil {
		return false, err
	}
	for _, s := range im.Snapshots() {
		if err := im.DeleteSnapshot(ctx, s.ID); err != nil {
			return false, err
		}
	}
	if im.Size() < size {
		if err := im.Resize(ctx, size); err != nil {
			return false, err
		}
	}
	return im.Info().BackingFile != "", nil
}
