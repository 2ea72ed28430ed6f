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
	e := newEntry(id)
	for _, load := range []func(*entry) error{p.loadRecord, p.loadSnapshots, p.loadViews, p.loadBacking} {
		if err := load(e); isDamage(err) {
			e.damage = errors.Join(e.damage, err)
		} else if err != nil {
			return nil, err
		}
	}
	if e.damage != nil {
		e.rec = nil
		e.damage = fmt.Errorf("%w; mend or restore the file, or give the volume up by moving %q out of the pool; then start the node agent again",
			e.damage, path.Join(p.path, volumeDir(id)))
	}
	return e, nil
}

func (p *Pool) loadRecord(e *entry) error {
	dir := volumeDir(e.id)
	if err := p.dir.RemoveTemporary(dir); err != nil {
		return err
	}
	e.rec = new(volumeRecord)
	err := durable.ReadRecord(p.dir, path.Join(dir, volumeRecName), volumeKind, volumeVersion, e.rec)
	if err == nil && e.rec.ID != e.id {
		err = fmt.Errorf("%w: its record is that of %q", ErrDamaged, e.rec.ID)
	}
	return err
}

// isDamage reports whether err, of reading a file or directory of one volume, is about
// that alone: the others can be used all the same.
func isDamage(err error) bool {
	for _, target := range []error{durable.ErrDamaged, ErrDamaged, fs.ErrNotExist, unix.EIO, unix.EUCLEAN, unix.EBADMSG, unix.EISDIR, unix.ENOTDIR, unix.ELOOP} {
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
			e.damage = errors.Join(e.damage, err)
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

// loadBacking reads the view that the header of e's image names as its backing file.
// What an image reads that does not tell is not known: it may be any view.
func (p *Pool) loadBacking(e *entry) (err error) {
	if e.backing, err = p.readBacking(e.id); isDamage(err) {
		p.blind = true
	}
	return err
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
