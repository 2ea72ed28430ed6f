package volume

import (
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"csi-qcow2/internal/durable"
	"csi-qcow2/qcow2"
)

// A Snapshot describes a snapshot of a volume.
type Snapshot struct {
	ID      string
	Name    string
	Volume  string // volume ID; the volume itself may be gone
	Size    int64  // virtual size when it was taken, bytes
	Created time.Time
	Group   string // ID of the group snapshot that it is a member of, "" for none
}

func (r *snapshotRecord) snapshot() Snapshot {
	return Snapshot{r.ID, r.Name, r.Volume, r.Size, r.Created, r.Group}
}

// A Quiesce brings those who write to some volumes to rest, calls cut, which
// takes milliseconds, and lets them go on. Its error undoes the snapshot. Nil
// calls cut at once.
type Quiesce func(ctx context.Context, cut func()) error

// CreateSnapshot takes a snapshot of the volume id, attached or not, or finds
// the one that an earlier call with the same name took. Writes that returned
// before the call are in it. Errors: ErrNotFound, ErrIncompatible, ErrBusy,
// ErrNoSpace, qcow2.ErrTooManySnapshots.
func (p *Pool) CreateSnapshot(ctx context.Context, name, id string) (Snapshot, error) {
	return p.CreateSnapshotQuiesced(ctx, name, id, nil)
}

// CreateSnapshotQuiesced is CreateSnapshot with the cut taken inside quiesce.
func (p *Pool) CreateSnapshotQuiesced(ctx context.Context, name, id string, quiesce Quiesce) (Snapshot, error) {
	if err := checkName(name); err != nil {
		return Snapshot{}, err
	}
	return detach(ctx, p, func(ctx context.Context) (Snapshot, error) { return p.createSnapshot(ctx, name, id, quiesce) })
}

func (p *Pool) createSnapshot(ctx context.Context, name, id string, quiesce Quiesce) (Snapshot, error) {
	snapID, _ := p.snapshotIDFor(name, id)
	unlockName, err := p.locks.lock(ctx, snapID)
	if err != nil {
		return Snapshot{}, err
	}
	defer unlockName()
	again, existing := p.snapshotIDFor(name, id)
	switch {
	case again != snapID:
		return Snapshot{}, fmt.Errorf("%w: snapshot %q is being deleted", ErrBusy, name)
	case existing != nil && existing.Volume != id:
		return Snapshot{}, fmt.Errorf("%w: snapshot %q is one of volume %s", ErrIncompatible, name, existing.Volume)
	case existing != nil:
		return existing.snapshot(), nil
	}
	if _, _, err := p.record(id); err != nil {
		return Snapshot{}, err
	}
	unlock, err := p.locks.lock(ctx, id)
	if err != nil {
		return Snapshot{}, err
	}
	defer unlock()
	e, vol, err := p.record(id)
	if err != nil {
		return Snapshot{}, err
	}
	rec, err := p.takeSnapshot(ctx, e, snapshotRecord{ID: snapID, Name: name, Volume: id, Filesystem: vol.Filesystem}, quiesce)
	if err != nil {
		p.wakeReaper()
		return Snapshot{}, err
	}
	return rec.snapshot(), nil
}

// snapshotIDFor returns the ID of the snapshot called name and its record, or
// the ID that a new one of the volume vol gets and nil. What an interrupted
// attempt on the same volume left is taken up.
func (p *Pool) snapshotIDFor(name, vol string) (string, *snapshotRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rec := p.snapshotNamedLocked(name); rec != nil {
		return rec.ID, rec
	}
	for n := 0; ; n++ {
		if id := p.makeID(kindSnapshot, name, n); p.freeLocked(id, vol) {
			return id, nil
		}
	}
}

// freeLocked reports whether a new snapshot of the volume vol may get the ID id: no
// other has it but what an interrupted attempt left, and no overlay reads what had
// it, whose record may be lost. The caller holds p.mu.
func (p *Pool) freeLocked(id, vol string) bool {
	if owner := p.snapshots[id]; owner != nil && (owner.id != vol || owner.snapshots[id].State != snapshotCreating) {
		return false
	}
	e := p.volumes[vol]
	return e == nil || !p.neededLocked(e, id)
}

// takeSnapshot takes the snapshot of rec, from its intent to its final record.
// The caller holds the ID lock of e.
func (p *Pool) takeSnapshot(ctx context.Context, e *entry, rec snapshotRecord, quiesce Quiesce) (*snapshotRecord, error) {
	taken, err := p.takeSnapshots(ctx, []*entry{e}, []snapshotRecord{rec}, quiesce)
	if err != nil {
		return nil, err
	}
	return &taken[0], p.putSnapshot(e, taken[0])
}

// takeSnapshots takes the snapshots of records, each of the volume at the same
// place of entries, at one moment. It returns their final records, which the
// caller has to write. The caller holds the ID locks of the volumes.
func (p *Pool) takeSnapshots(ctx context.Context, entries []*entry, records []snapshotRecord, quiesce Quiesce) (taken []snapshotRecord, err error) {
	now := time.Now().UTC()
	requests := make([]qcow2.SnapshotRequest, len(entries))
	for i, e := range entries {
		rec := records[i]
		rec.State, rec.Created = snapshotCreating, now
		taken = append(taken, rec)
		d, err := p.prepareSnapshot(ctx, e, rec)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, d.Close()) }()
		requests[i] = qcow2.SnapshotRequest{Image: d.Image, Snapshot: qcow2.Snapshot{Name: rec.ID, Date: now, ICount: -1}}
	}
	cuts, err := qcow2.CreateSnapshotsWithin(ctx, requests, func(cut func()) error {
		if quiesce == nil {
			cut()
			return nil
		}
		return quiesce(ctx, cut)
	})
	if err != nil {
		return nil, spaceError(fmt.Errorf("snapshot of %s: %w", entries[0].id, err))
	}
	if err := p.checkFilesystems(entries, taken); err != nil {
		return nil, err
	}
	for i := range taken {
		taken[i].State, taken[i].Size = snapshotReady, cuts[i].DiskSize
	}
	return taken, nil
}

// checkFilesystems refuses snapshots that were cut while what is known of a
// filesystem changed: a restore could neither be mounted nor formatted.
func (p *Pool) checkFilesystems(entries []*entry, taken []snapshotRecord) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, e := range entries {
		if e.rec.Filesystem != taken[i].Filesystem {
			return fmt.Errorf("%w: volume %s was staged for the first time meanwhile", ErrBusy, e.id)
		}
	}
	return nil
}

// prepareSnapshot writes the intent to take the snapshot of rec and opens the
// image of e, which holds nothing of an earlier attempt then.
func (p *Pool) prepareSnapshot(ctx context.Context, e *entry, rec snapshotRecord) (*Disk, error) {
	p.mu.Lock()
	formatting := e.rec.Filesystem.State == FilesystemFormatting
	shown := p.views.inUse(viewRef{e.id, rec.ID})
	p.mu.Unlock()
	if formatting {
		// A clone of half a filesystem could neither be mounted nor formatted.
		return nil, fmt.Errorf("%w: volume %s is being formatted", ErrBusy, e.id)
	}
	if shown {
		return nil, fmt.Errorf("%w: an earlier snapshot %s is still open", ErrBusy, rec.ID)
	}
	// A hidden snapshot may follow one of the same ID whose clone was deleted.
	if err := p.removeView(e, rec.ID); err != nil {
		return nil, err
	}
	if err := p.putSnapshot(e, rec); err != nil {
		return nil, err
	}
	d, err := p.openAny(ctx, e.id)
	if err != nil {
		return nil, err
	}
	// What an interrupted attempt cut was promised to nobody, and is older than
	// the writes that were acknowledged since.
	if err := dropSnapshot(ctx, d.Image, rec.ID); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// dropSnapshot deletes the internal snapshot called name; its absence is success.
func dropSnapshot(ctx context.Context, im *qcow2.Image, name string) error {
	if err := im.DeleteSnapshot(ctx, name); err != nil && !errors.Is(err, qcow2.ErrSnapshotNotFound) {
		return err
	}
	return nil
}

// putSnapshot writes a snapshot record durably, then into the index.
func (p *Pool) putSnapshot(e *entry, rec snapshotRecord) error {
	if err := p.writeSnapshot(rec); err != nil {
		return err
	}
	p.mu.Lock()
	e.snapshots[rec.ID] = &rec
	p.snapshots[rec.ID] = e
	p.mu.Unlock()
	return nil
}

func (p *Pool) writeSnapshot(rec snapshotRecord) error {
	return spaceError(durable.WriteRecord(p.dir, snapshotRecName(rec.Volume, rec.ID), snapshotKind, snapshotVersion, rec))
}

// snapshotRecord returns the entry and record of a snapshot that users see.
func (p *Pool) snapshotRecord(id string) (*entry, snapshotRecord, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.snapshots[id]; e != nil && e.snapshots[id].live() {
		return e, *e.snapshots[id], nil
	}
	return nil, snapshotRecord{}, fmt.Errorf("%w: snapshot %q", ErrNotFound, id)
}

// GetSnapshot returns the snapshot id. Errors: ErrNotFound.
func (p *Pool) GetSnapshot(id string) (Snapshot, error) {
	_, rec, err := p.snapshotRecord(id)
	if err != nil {
		return Snapshot{}, err
	}
	return rec.snapshot(), nil
}

// SnapshotNamed returns the ID of the snapshot that was created with name.
func (p *Pool) SnapshotNamed(name string) (id string, exists bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rec := p.snapshotNamedLocked(name)
	if rec == nil {
		return "", false
	}
	return rec.ID, true
}

func (p *Pool) snapshotNamedLocked(name string) *snapshotRecord {
	for id, e := range p.snapshots {
		if rec := e.snapshots[id]; rec.live() && rec.Name == name {
			return rec
		}
	}
	return nil
}

// A SnapshotFilter selects snapshots; empty fields select all.
type SnapshotFilter struct{ ID, Volume string }

// ListSnapshots returns up to limit snapshots (0 for all) that f selects after the token in
// ID order, and the token of the next page, "" after the last.
func (p *Pool) ListSnapshots(f SnapshotFilter, token string, limit int) ([]Snapshot, string, error) {
	if token != "" && !snapshotIDPattern.MatchString(token) {
		return nil, "", fmt.Errorf("%w: %q", ErrBadToken, token)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []Snapshot
	for id, e := range p.snapshots {
		rec := e.snapshots[id]
		if rec.live() && id > token && (f.ID == "" || f.ID == id) && (f.Volume == "" || f.Volume == rec.Volume) {
			all = append(all, rec.snapshot())
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].ID < all[j].ID })
	if limit > 0 && len(all) > limit {
		return all[:limit], all[limit-1].ID, nil
	}
	return all, "", nil
}
