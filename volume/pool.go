package volume

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/cache"
	"csi-qcow2/internal/durable"
	"csi-qcow2/qcow2"
)

// Options configure a pool.
type Options struct {
	// Cache holds the metadata tables of all images. Nil gives each image a
	// cache of its own of qcow2.DefaultCacheBytes.
	Cache *cache.Cache
	// Guard bounds what the pool promises and takes; the zero value does not.
	Guard Guard
	// CopyBandwidth bounds what volumes of CloneCopy copy in the background, in
	// bytes per second; 0 sets no bound.
	CopyBandwidth int64
	// ClosedOnly makes no pool of an empty directory, and refuses, with ErrInUse,
	// images that were not closed by their last user: for a program that works on
	// the pool while the node agent, whose cache has the rest of them, does not run.
	ClosedOnly bool

	// Seams of tests: step is called around each change of the directory,
	// wrapFile around each image file opened read-write.
	step     durable.Step
	wrapFile func(qcow2.File) qcow2.File
}

// A Pool is an open pool. See the package comment.
type Pool struct {
	dir     *durable.Dir
	path    string // absolute, without symbolic links
	lock    *os.File
	uuid    string
	opts    Options
	ctx     context.Context // of background work; ends at Close
	cancel  context.CancelFunc
	workers sync.WaitGroup // background work and detached changes
	kick    chan struct{}  // wakes the reaper; holds one
	copies  chan struct{}  // wakes the copier; holds one
	locks   keyLock        // by volume or snapshot ID
	guard   guard
	images  shared[string, *qcow2.Image]
	views   shared[viewRef, *qcow2.Image]
	blind   bool // some image does not tell what it reads: it may read any view; set by load

	mu        sync.Mutex
	closed    bool                    // guarded by mu
	volumes   map[string]*entry       // by volume ID, tombstones included; guarded by mu
	snapshots map[string]*entry       // by snapshot ID: the entry of its volume; guarded by mu
	groups    map[string]*groupRecord // by ID, tombstones included; the records are replaced, never changed; guarded by mu
	failures  map[string]error        // background failures by volume ID; guarded by mu
}

// An entry is a volume in the index.
type entry struct {
	id string

	writeMu sync.Mutex // serialises changes of the record; held over its durable write

	// All below: guarded by Pool.mu. The records are replaced, never changed.
	rec        *volumeRecord // nil when damaged
	damage     error         // why rec is nil, and what to do about it
	backing    *viewRef      // what the image's header names; nil for none
	snapshots  map[string]*snapshotRecord
	views      map[string]bool // snapshots that have a view
	dependents map[string]int  // by snapshot: how many overlays name its view
	going      map[string]bool // snapshots that are being removed: their views open no more
	copy       copyJob
	reverting  bool // nobody may open it
}

func newEntry(id string) *entry {
	return &entry{
		id:         id,
		snapshots:  make(map[string]*snapshotRecord),
		views:      make(map[string]bool),
		dependents: make(map[string]int),
		going:      make(map[string]bool),
	}
}

// countDependent adds n to the dependents of what e's image is an overlay of.
// The caller holds Pool.mu.
func (p *Pool) countDependent(e *entry, n int) {
	if e.backing == nil {
		return
	}
	if source := p.volumes[e.backing.Volume]; source != nil {
		source.dependents[e.backing.Snapshot] += n
		if source.dependents[e.backing.Snapshot] == 0 {
			delete(source.dependents, e.backing.Snapshot)
		}
	}
}

// live reports whether users see the volume. The caller holds Pool.mu.
func (e *entry) live() bool { return e.rec == nil || !e.rec.Deleted }

// Open opens the pool in the existing directory path and takes its lock. An
// empty directory becomes a pool. Errors: ErrPoolInUse, ErrNotPool, ErrInvalid.
func Open(ctx context.Context, path string, o Options) (_ *Pool, err error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, unopened(path, err)
	}
	dir, err := durable.OpenDir(real)
	if err != nil {
		return nil, unopened(path, err)
	}
	dir.SetStep(o.step)
	p := &Pool{
		dir: dir, path: dir.Path(), opts: o,
		kick:      make(chan struct{}, 1),
		copies:    make(chan struct{}, 1),
		volumes:   make(map[string]*entry),
		snapshots: make(map[string]*entry),
		groups:    make(map[string]*groupRecord),
		failures:  make(map[string]error),
	}
	p.guard.opts = o.Guard
	p.ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	p.images = shared[string, *qcow2.Image]{ctx: p.ctx, open: p.openImage, shut: p.shutImage, workers: &p.workers}
	p.views = shared[viewRef, *qcow2.Image]{ctx: p.ctx, open: caught(p.openView), shut: shutView, workers: &p.workers}
	defer func() {
		if err != nil {
			p.cancel()
			err = errors.Join(err, p.unlock(), dir.Close())
		}
	}()
	for _, setUp := range []func() error{o.Guard.Validate, p.checkDirectory, p.takeLock, p.readMarker, p.emptyIncoming, p.load, p.look} {
		if err := setUp(); err != nil {
			return nil, fmt.Errorf("pool %q: %w", p.path, err)
		}
	}
	return p, nil
}

// unopened says what to do about a path that is no directory.
func unopened(path string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("pool %q: %w: make the directory or mount its file system, or give another path", path, err)
	}
	return fmt.Errorf("pool %q: %w", path, err)
}

// checkDirectory refuses a directory that others can write to, a path that is
// too long for the names that overlays record, and with ClosedOnly a directory
// that is no pool yet.
func (p *Pool) checkDirectory() error {
	info, err := os.Stat(p.path)
	if err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%w: others can write to it (mode %04o); run chmod go-w", ErrNotPool, info.Mode().Perm())
	}
	if p.opts.ClosedOnly {
		if _, err := os.Stat(filepath.Join(p.path, poolRecordName)); err != nil {
			return fmt.Errorf("%w: %w", ErrNotPool, err)
		}
	}
	longest := viewRef{p.longestID("vol"), p.longestID("snap")}
	if n := len(p.backingName(longest)); n > maxBackingName {
		return fmt.Errorf("%w: the path is %d bytes too long for a backing file name", ErrNotPool, n-maxBackingName)
	}
	return nil
}

func (p *Pool) longestID(prefix string) string {
	return prefix + "-00000000-00000000000000000000000000000000"
}

func (p *Pool) takeLock() error {
	f, err := p.dir.OpenFile(lockName, unix.O_RDWR|unix.O_CREAT, 0o600)
	if errors.Is(err, unix.EPERM) { // an immutable mount point, see README.md
		return fmt.Errorf("%w: mount its file system there", err)
	}
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w; stop it first", ErrPoolInUse)
		}
		return fmt.Errorf("lock: %w", err)
	}
	p.lock = f
	return nil
}

// unlock drops the lock of the pool, if it is held: also of the copy that a process
// has which is just being started.
func (p *Pool) unlock() error {
	if p.lock == nil {
		return nil
	}
	return errors.Join(unix.Flock(int(p.lock.Fd()), unix.LOCK_UN), p.lock.Close())
}

// readMarker reads pool.json, or makes an empty directory a pool.
func (p *Pool) readMarker() error {
	var rec poolRecord
	err := durable.ReadRecord(p.dir, poolRecordName, poolKind, poolVersion, &rec)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if rec, err = p.initialise(); err != nil {
			return err
		}
	case errors.Is(err, durable.ErrDamaged):
		return fmt.Errorf("%w: %v", ErrNotPool, err)
	case err != nil:
		return err
	}
	if b, err := hex.DecodeString(rec.UUID); err != nil || len(b) != 16 {
		return fmt.Errorf("%w: UUID %q in %s", ErrNotPool, rec.UUID, poolRecordName)
	}
	p.uuid = rec.UUID
	return nil
}

// initialise writes the marker last, so that a crash leaves a directory that
// this function accepts again.
func (p *Pool) initialise() (poolRecord, error) {
	names, err := p.dir.List(".")
	if err != nil {
		return poolRecord{}, err
	}
	for _, name := range names {
		switch name {
		case lockName, "lost+found":
			continue
		case incomingDir, volumesDir, groupsDir:
			if inside, err := p.dir.List(name); err == nil && len(inside) == 0 {
				continue
			}
		}
		return poolRecord{}, fmt.Errorf("%w: it has no %s and holds %q; give an empty directory", ErrNotPool, poolRecordName, name)
	}
	for _, name := range []string{incomingDir, volumesDir, groupsDir} {
		if err := p.dir.Mkdir(name); err != nil {
			return poolRecord{}, err
		}
	}
	var uuid [16]byte
	if _, err := rand.Read(uuid[:]); err != nil {
		return poolRecord{}, err
	}
	rec := poolRecord{UUID: hex.EncodeToString(uuid[:]), Created: time.Now().UTC()}
	return rec, durable.WriteRecord(p.dir, poolRecordName, poolKind, poolVersion, rec)
}

// emptyIncoming removes what a predecessor was making or removing when it died.
func (p *Pool) emptyIncoming() error {
	names, err := p.dir.List(incomingDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := p.dir.RemoveAll(incomingName(name)); err != nil {
			return err
		}
	}
	return p.dir.RemoveTemporary(incomingDir)
}

// Close waits for changes under way and closes what is open. Volumes must have
// been closed by their users; the error says so if not.
func (p *Pool) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return ErrClosed
	}
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.workers.Wait()
	var errs []error
	for _, id := range p.images.keys() {
		errs = append(errs, fmt.Errorf("volume %s was still open", id), p.images.closeNow(id))
	}
	for _, v := range p.views.keys() {
		errs = append(errs, p.views.closeNow(v))
	}
	return errors.Join(append(errs, p.unlock(), p.dir.Close())...)
}

// ID returns the first 8 digits of the pool's UUID, which its volume and
// snapshot IDs carry.
func (p *Pool) ID() string { return p.uuid[:8] }

// Path returns the absolute path of the pool's directory.
func (p *Pool) Path() string { return p.path }

// detach runs a change that goes on when its caller leaves. The caller gets
// ctx's error then; a retry gets ErrBusy until the change has ended. A panic of the
// change ends the process: what is half changed in memory must not be written on, and
// the next process goes on from what is whole, as after any other death.
func detach[T any](ctx context.Context, p *Pool, change func(context.Context) (T, error)) (T, error) {
	var none T
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return none, ErrClosed
	}
	p.workers.Add(1)
	p.mu.Unlock()
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() { // ends when the change does; Close waits for it
		defer p.workers.Done()
		value, err := change(p.ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

// detachErr is detach for a change without a result.
func detachErr(ctx context.Context, p *Pool, change func(context.Context) error) error {
	_, err := detach(ctx, p, func(ctx context.Context) (struct{}, error) { return struct{}{}, change(ctx) })
	return err
}

// find returns the entry of the volume id, tombstone or not.
func (p *Pool) find(id string) *entry {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.volumes[id]
}

// record returns the record of a volume that users see.
func (p *Pool) record(id string) (*entry, volumeRecord, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.volumes[id]
	switch {
	case e == nil || !e.live():
		return nil, volumeRecord{}, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	case e.rec == nil:
		return nil, volumeRecord{}, fmt.Errorf("%w: volume %s: %w", ErrDamaged, id, e.damage)
	}
	return e, *e.rec, nil
}

// updateRecord changes the record of e durably, then in the index.
func (p *Pool) updateRecord(e *entry, change func(*volumeRecord)) error {
	e.writeMu.Lock()
	defer e.writeMu.Unlock()
	p.mu.Lock()
	if e.rec == nil {
		p.mu.Unlock()
		return fmt.Errorf("%w: volume %s: %w", ErrDamaged, e.id, e.damage)
	}
	next := *e.rec
	p.mu.Unlock()
	change(&next)
	name := filepath.Join(volumeDir(e.id), volumeRecName)
	if err := durable.WriteRecord(p.dir, name, volumeKind, volumeVersion, next); err != nil {
		return spaceError(err)
	}
	p.mu.Lock()
	e.rec = &next
	p.mu.Unlock()
	return nil
}

// sortedIDs returns the IDs of all entries in order.
func (p *Pool) sortedIDs() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := make([]string, 0, len(p.volumes))
	for id := range p.volumes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// spaceError makes a full host file system recognisable as ErrNoSpace.
func spaceError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
