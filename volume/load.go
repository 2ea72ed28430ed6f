package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/durable"
)

// load builds the index from the directory. A volume whose record or header
// cannot be read, or does not decode, stays in the index as damaged: it cannot be
// used, it is reported, and nothing that it might need is removed.
func (p *Pool) load() error {
	ids, err := p.dir.List(volumesDir)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if m := volumeIDPattern.FindStringSubmatch(id); m == nil || m[1] != p.ID() {
			return fmt.Errorf("%w: %s holds %q, which is no volume of this pool; move it away", ErrNotPool, volumesDir, id)
		}
		e, err := p.loadVolume(id)
		if err != nil {
			return err
		}
		p.volumes[id] = e
		for snap := range e.snapshots {
			p.snapshots[snap] = e
		}
	}
	for _, e := range p.volumes {
		p.countDependent(e, 1)
	}
	return p.loadGroups()
}

// loadVolume reads the records and the header of one volume. Its error is that
// of a pool that cannot be read; damage goes into the entry.
func (p *Pool) loadVolume(id string) (*entry, error) {
	dir := volumeDir(id)
	if err := p.dir.RemoveTemporary(dir); err != nil {
		return nil, err
	}
	e := newEntry(id)
	var rec volumeRecord
	err := durable.ReadRecord(p.dir, path.Join(dir, volumeRecName), volumeKind, volumeVersion, &rec)
	switch {
	case isDamage(err):
		e.damage = err
	case err != nil:
		return nil, err
	case rec.ID != id:
		e.damage = fmt.Errorf("its record is that of %q", rec.ID)
	default:
		e.rec = &rec
	}
	if err := p.loadSnapshots(e); err != nil {
		return nil, err
	}
	if err := p.loadViews(e); err != nil {
		return nil, err
	}
	backing, err := p.readBacking(id)
	if err != nil {
		if !isDamage(err) {
			return nil, err
		}
		e.damage, e.rec = errors.Join(e.damage, err), nil
		p.blind = true
	}
	e.backing = backing
	if e.damage != nil {
		e.damage = fmt.Errorf("%w; mend or restore the file, or give the volume up by moving %q out of the pool; then start the node agent again",
			e.damage, path.Join(p.path, dir))
	}
	return e, nil
}

// isDamage reports whether err, of reading a file of one volume, is about that file
// alone: the others can be used all the same.
func isDamage(err error) bool {
	for _, target := range []error{durable.ErrDamaged, ErrDamaged, fs.ErrNotExist, unix.EIO, unix.EUCLEAN, unix.EBADMSG, unix.EISDIR, unix.ELOOP} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

func (p *Pool) loadSnapshots(e *entry) error {
	dir := path.Join(volumeDir(e.id), snapshotsDir)
	if err := p.dir.RemoveTemporary(dir); err != nil {
		return err
	}
	names, err := p.dir.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		id, isRecord := strings.CutSuffix(name, ".json")
		if !isRecord || !snapshotIDPattern.MatchString(id) {
			return fmt.Errorf("%w: %s holds %q, which is no snapshot record; move it away", ErrNotPool, dir, name)
		}
		rec := new(snapshotRecord)
		err := durable.ReadRecord(p.dir, path.Join(dir, name), snapshotKind, snapshotVersion, rec)
		if err == nil && (rec.ID != id || rec.Volume != e.id) {
			err = fmt.Errorf("%w: record %q is that of %q in %q", durable.ErrDamaged, name, rec.ID, rec.Volume)
		}
		if isDamage(err) {
			// The image still has the internal snapshot. Keep the volume as it is.
			e.damage, e.rec = errors.Join(e.damage, err), nil
			continue
		}
		if err != nil {
			return err
		}
		e.snapshots[id] = rec
	}
	return nil
}

func (p *Pool) loadViews(e *entry) error {
	dir := path.Join(volumeDir(e.id), viewsDir)
	names, err := p.dir.List(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		snap, isImage := strings.CutSuffix(name, ".qcow2")
		if !isImage || !snapshotIDPattern.MatchString(snap) {
			return fmt.Errorf("%w: %s holds %q, which is no view; move it away", ErrNotPool, dir, name)
		}
		e.views[snap] = true
	}
	return nil
}

// readBacking returns the view that the header of a volume's image names as its
// backing file, nil for none. A name that is not a view of ours is ErrDamaged.
func (p *Pool) readBacking(id string) (*viewRef, error) {
	name := path.Join(volumeDir(id), diskName)
	f, err := p.dir.OpenFile(name, unix.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	backing, err := readBackingName(f)
	if err != nil || backing == "" {
		return nil, err
	}
	v, err := parseBackingName(backing)
	if err != nil {
		return nil, err
	}
	return &v, nil
}
