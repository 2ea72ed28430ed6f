package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"sort"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/durable"
	"csi-qcow2/qcow2"
)

// A Volume describes a volume.
type Volume struct {
	ID         string
	Name       string
	Size       int64 // virtual size, bytes
	Params     Params
	Source     Source
	Created    time.Time
	Filesystem Filesystem
	Copy       Copy
}

func (r *volumeRecord) volume() Volume {
	return Volume{r.ID, r.Name, r.Size, r.Params, r.Source, r.Created, r.Filesystem, r.Copy}
}

// Bounds of the virtual size of a volume, in bytes.
const (
	MinSize     = 1 << 20
	MaxSize     = 64 << 40
	DefaultSize = 1 << 30
	// SizeUnit is what sizes are rounded up to: the largest logical block.
	SizeUnit = 4096
)

// A SizeRange is a request for a size in bytes, as CSI makes it: at least
// Required, at most Limit, zero for no bound.
type SizeRange struct{ Required, Limit int64 }

// pick returns the smallest allowed size of at least low bytes that r allows.
func (r SizeRange) pick(low int64) (int64, error) {
	if r.Required < 0 || r.Limit < 0 || (r.Limit > 0 && r.Limit < r.Required) {
		return 0, fmt.Errorf("%w: required %d bytes, limit %d bytes", ErrInvalid, r.Required, r.Limit)
	}
	want := max(r.Required, low, MinSize)
	if want > MaxSize {
		return 0, fmt.Errorf("%w: %d bytes, at most %d", ErrOutOfRange, want, int64(MaxSize))
	}
	size := (want + SizeUnit - 1) &^ (SizeUnit - 1)
	if r.Limit > 0 && size > r.Limit {
		return 0, fmt.Errorf("%w: the smallest possible size is %d bytes, the limit %d", ErrOutOfRange, size, r.Limit)
	}
	return size, nil
}

// holds reports whether size satisfies r.
func (r SizeRange) holds(size int64) bool {
	return size >= r.Required && (r.Limit == 0 || size <= r.Limit)
}

// A CreateRequest says what a volume shall be. The name makes it idempotent.
type CreateRequest struct {
	Name   string
	Size   SizeRange
	Params Params
	Source Source // at most one of its fields
	// Quiesce is for the cut of a source that is a volume.
	Quiesce Quiesce
}

// Create makes a volume, or finds the one that an earlier call with the same
// name made. Errors: ErrInvalid, ErrIncompatible (the name exists and differs),
// ErrNotFound (the source), ErrOutOfRange, ErrNoSpace, ErrTooDeep, ErrBusy.
func (p *Pool) Create(ctx context.Context, req CreateRequest) (Volume, error) {
	if err := checkName(req.Name); err != nil {
		return Volume{}, err
	}
	if _, err := req.Size.pick(0); err != nil {
		return Volume{}, err
	}
	return detach(ctx, p, func(ctx context.Context) (Volume, error) { return p.create(ctx, req) })
}

func (p *Pool) create(ctx context.Context, req CreateRequest) (Volume, error) {
	id, _ := p.volumeIDFor(req.Name)
	unlock, err := p.locks.lock(ctx, id)
	if err != nil {
		return Volume{}, err
	}
	defer unlock()
	again, existing := p.volumeIDFor(req.Name)
	switch {
	case again != id:
		return Volume{}, fmt.Errorf("%w: volume %q is being deleted", ErrBusy, req.Name)
	case existing != nil:
		return compatible(existing, req)
	}
	rec := volumeRecord{ID: id, Name: req.Name, Params: req.Params, Source: req.Source, Created: time.Now().UTC()}
	if req.Source.Empty() {
		if rec.Size, err = req.Size.pick(defaultIfZero(req.Size, DefaultSize)); err != nil {
			return Volume{}, err
		}
		kept, err := p.reserve(rec)
		if err != nil {
			return Volume{}, err
		}
		defer kept()
		return p.build(ctx, rec, p.newImage(rec, nil))
	}
	return p.createFrom(ctx, req, rec)
}

// defaultIfZero returns size when r asks for no size, cut to r's limit.
func defaultIfZero(r SizeRange, size int64) int64 {
	if r.Required > 0 {
		return 0
	}
	if r.Limit > 0 {
		return min(size, r.Limit&^(SizeUnit-1))
	}
	return size
}

// volumeIDFor returns the ID of the volume called name and its record, or the
// ID that a new one gets and nil.
func (p *Pool) volumeIDFor(name string) (string, *volumeRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rec := p.volumeNamedLocked(name); rec != nil {
		return rec.ID, rec
	}
	for n := 0; ; n++ {
		id := p.makeID(kindVolume, name, n)
		if p.volumes[id] == nil && !p.readLocked(id) {
			return id, nil
		}
	}
}

// readLocked reports whether an overlay reads the volume id, which may be lost. The
// caller holds p.mu.
func (p *Pool) readLocked(id string) bool {
	for _, e := range p.volumes {
		if e.backing != nil && e.backing.Volume == id {
			return true
		}
	}
	return false
}

// VolumeNamed returns the ID of the volume that was created with name.
func (p *Pool) VolumeNamed(name string) (id string, exists bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rec := p.volumeNamedLocked(name)
	if rec == nil {
		return "", false
	}
	return rec.ID, true
}

func (p *Pool) volumeNamedLocked(name string) *volumeRecord {
	for _, e := range p.volumes {
		if e.rec != nil && !e.rec.Deleted && e.rec.Name == name {
			return e.rec
		}
	}
	return nil
}

// compatible answers a Create for a name that exists.
func compatible(rec *volumeRecord, req CreateRequest) (Volume, error) {
	differs := ""
	switch {
	case rec.Source != req.Source:
		differs = "source"
	case rec.Params != req.Params:
		differs = "parameters"
	case !req.Size.holds(rec.Size):
		differs = fmt.Sprintf("size (%d bytes)", rec.Size)
	default:
		return rec.volume(), nil
	}
	return Volume{}, fmt.Errorf("%w: volume %q has another %s", ErrIncompatible, req.Name, differs)
}

// reserve refuses what cannot be reserved: a reservation leaves the space that
// the pool's Guard keeps, or no volume could be written or made beside it. Volumes
// without preallocation are thin: they may promise more than the pool holds. The
// caller calls kept when the space is taken, or will not be. What is taken already
// counts twice until then, so that one of two that are made at once may be refused.
func (p *Pool) reserve(rec volumeRecord) (kept func(), err error) {
	size := rec.Params.reserved(rec.Size)
	if size == 0 {
		return func() {}, nil
	}
	sum, kept := p.guard.reserve(size)
	c, err := p.Capacity() // afterwards: what others have taken is gone from it, or in the sum
	if err != nil {
		kept()
		return nil, err
	}
	if room := p.guard.opts.reservable(c); sum > room {
		kept()
		return nil, fmt.Errorf("%w: %d bytes to reserve in pool %q, %d with others at once, and %d of the %d that are left may be; free space, add some, or use preallocation=off",
			ErrNoSpace, size, p.path, sum, room, c.Available)
	}
	return kept, nil
}

// An imageMaker makes the image of a new volume as the new file name, durably, and
// returns the view that it is an overlay of, nil for none.
type imageMaker func(ctx context.Context, name string) (*viewRef, error)

// newImage returns the maker of an empty image, or of an overlay of backing.
func (p *Pool) newImage(rec volumeRecord, backing *viewRef) imageMaker {
	o := qcow2.CreateOptions{
		ClusterSize:   rec.Params.ClusterSize,
		LazyRefcounts: rec.Params.LazyRefcounts,
		Preallocation: rec.Params.Preallocation,
	}
	if backing != nil {
		o.BackingFile, o.BackingFormat = p.backingName(*backing), "qcow2"
		o.Preallocation = qcow2.PreallocationOff // it would hide what the clone is made from
	}
	return func(ctx context.Context, name string) (*viewRef, error) {
		return backing, p.createImage(ctx, name, rec.Size, o, nil, rec.Params.DirectIO)
	}
}

// build makes the volume of rec, whose image image makes, in incoming/ and
// publishes it. The caller holds its ID lock.
func (p *Pool) build(ctx context.Context, rec volumeRecord, image imageMaker) (Volume, error) {
	kept, err := p.promise(rec.Size)
	if err != nil {
		return Volume{}, err
	}
	defer kept()
	dir := incomingName(rec.ID)
	if err := p.dir.RemoveAll(dir); err != nil { // of an attempt that failed
		return Volume{}, err
	}
	backing, err := p.fill(ctx, dir, rec, image)
	if err != nil {
		return Volume{}, errors.Join(spaceError(err), p.dir.RemoveAll(dir))
	}
	if err := p.dir.Publish(dir, volumeDir(rec.ID)); err != nil {
		return Volume{}, errors.Join(err, p.takeBack(dir, volumeDir(rec.ID)))
	}
	e := newEntry(rec.ID)
	e.rec, e.backing = &rec, backing
	p.mu.Lock()
	p.volumes[rec.ID] = e
	p.countDependent(e, 1)
	p.mu.Unlock()
	return rec.volume(), nil
}

// takeBack undoes a publication from dir to name that has failed. It may have its name
// all the same, only not durably: nobody would know it, nor what it reads from, until
// the next start, and no retry could take the name.
func (p *Pool) takeBack(dir, name string) error {
	if left, err := p.dir.Exists(dir); left || err != nil {
		return err
	}
	return p.dir.Rename(name, dir)
}

// fill makes the files of a new volume in dir. The record is written last, and
// its write makes the entries before it durable.
func (p *Pool) fill(ctx context.Context, dir string, rec volumeRecord, image imageMaker) (*viewRef, error) {
	for _, d := range []string{dir, path.Join(dir, snapshotsDir), path.Join(dir, viewsDir)} {
		if err := p.dir.Mkdir(d); err != nil {
			return nil, err
		}
	}
	backing, err := image(ctx, path.Join(dir, diskName))
	if err != nil {
		return nil, err
	}
	return backing, durable.WriteRecord(p.dir, path.Join(dir, volumeRecName), volumeKind, volumeVersion, rec)
}

// Get returns the volume id. Errors: ErrNotFound, ErrDamaged.
func (p *Pool) Get(id string) (Volume, error) {
	_, rec, err := p.record(id)
	if err != nil {
		return Volume{}, err
	}
	return rec.volume(), nil
}

// List returns up to limit volumes (0 for all) after the token in ID order, and the token
// of the next page, "" after the last.
func (p *Pool) List(token string, limit int) ([]Volume, string, error) {
	if token != "" && !volumeIDPattern.MatchString(token) {
		return nil, "", fmt.Errorf("%w: %q", ErrBadToken, token)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []Volume
	for id, e := range p.volumes {
		if e.rec != nil && !e.rec.Deleted && id > token {
			all = append(all, e.rec.volume())
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].ID < all[j].ID })
	if limit > 0 && len(all) > limit {
		return all[:limit], all[limit-1].ID, nil
	}
	return all, "", nil
}

// Expand makes the volume id at least as large as size asks. A volume that is
// large enough stays as it is. It works while the volume is attached; the
// caller tells the device. Errors: ErrNotFound, ErrOutOfRange, ErrBusy, ErrNoSpace.
func (p *Pool) Expand(ctx context.Context, id string, size SizeRange) (Volume, error) {
	want, err := size.pick(0)
	if err != nil {
		return Volume{}, err
	}
	err = detachErr(ctx, p, func(ctx context.Context) error {
		unlock, err := p.locks.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		return p.expand(ctx, id, want, size.Limit)
	})
	if err != nil {
		return Volume{}, err
	}
	return p.Get(id)
}

func (p *Pool) expand(ctx context.Context, id string, want, limit int64) (err error) {
	e, rec, err := p.record(id)
	if err != nil {
		return err
	}
	if limit > 0 && rec.Size > limit {
		return fmt.Errorf("%w: volume %s has %d bytes, the limit is %d", ErrOutOfRange, id, rec.Size, limit)
	}
	if rec.Size >= want {
		return nil
	}
	kept, err := p.promise(want - rec.Size)
	if err != nil {
		return err
	}
	defer kept()
	d, err := p.openAny(ctx, id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	// An earlier attempt may have ended between the image and its record.
	if d.Image.Size() < want {
		if err := d.Image.Resize(ctx, want); err != nil {
			return spaceError(fmt.Errorf("expand %s: %w", id, err))
		}
	}
	return p.updateRecord(e, func(r *volumeRecord) { r.Size = d.Image.Size() })
}

// SetFilesystem records what is known about the content of the volume id. It
// is durable when it returns.
func (p *Pool) SetFilesystem(id string, f Filesystem) error {
	e, rec, err := p.record(id)
	if err != nil || rec.Filesystem == f {
		return err
	}
	return p.updateRecord(e, func(r *volumeRecord) { r.Filesystem = f })
}

// A Capacity says how much room a pool has, in bytes.
type Capacity struct {
	Total, Available int64
	ReadOnly         bool // nothing can be written, as after an error of the file system
}

// Capacity asks the host file system.
func (p *Pool) Capacity() (Capacity, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(p.dir.Fd(), &st); err != nil {
		return Capacity{}, &fs.PathError{Op: "statfs", Path: p.path, Err: err}
	}
	return capacity(&st), nil
}

// capacity counts what st says. Its blocks are of Frsize bytes: Bsize, which a FUSE
// file system may make larger, is what it likes to be asked for at once.
func capacity(st *unix.Statfs_t) Capacity {
	unit := st.Frsize
	if unit == 0 {
		unit = st.Bsize
	}
	return Capacity{Total: scale(st.Blocks, unit), Available: scale(st.Bavail, unit), ReadOnly: st.Flags&unix.ST_RDONLY != 0}
}

// scale multiplies without overflow: some file systems claim 2^63 blocks.
func scale(blocks uint64, size int64) int64 {
	if size <= 0 || blocks > math.MaxInt64/uint64(size) {
		return math.MaxInt64
	}
	return int64(blocks) * size
}
