package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"csi-qcow2/internal/durable"
)

// A group snapshot is a snapshot of each of several volumes, all of one moment.
// Its record decides for all of its members: they exist when it says "ready" and
// names them, so that one write of one file makes, or deletes, all or none.
//
//	groups/<ID>.json "creating"       names volumes and snapshots
//	snapshots/<ID>.json "creating"    of each member
//	one cut over all images           see qcow2.CreateSnapshotsWithin
//	snapshots/<ID>.json "ready"       of each member; still of no consequence
//	groups/<ID>.json "ready"          the commit
//
// Deleting writes "deleted" into the record of the group. The reaper removes what
// is left of members, and the record of the group after the last.

// A Group describes a group snapshot.
type Group struct {
	ID        string
	Name      string
	Created   time.Time
	Snapshots []Snapshot // in the order of their volume IDs
}

// CreateGroup takes a snapshot of each of the volumes at one moment, inside
// quiesce, or finds those that an earlier call with the same name took. All or
// none exist, whatever happens on the way. Errors: those of CreateSnapshot;
// ErrInvalid for no volumes or one that occurs twice.
func (p *Pool) CreateGroup(ctx context.Context, name string, volumes []string, quiesce Quiesce) (Group, error) {
	if err := checkName(name); err != nil {
		return Group{}, err
	}
	volumes = slices.Sorted(slices.Values(volumes))
	if len(volumes) == 0 || len(slices.Compact(slices.Clone(volumes))) < len(volumes) {
		return Group{}, fmt.Errorf("%w: a group snapshot needs volumes, each once; got %q", ErrInvalid, volumes)
	}
	return detach(ctx, p, func(ctx context.Context) (Group, error) { return p.createGroup(ctx, name, volumes, quiesce) })
}

func (p *Pool) createGroup(ctx context.Context, name string, volumes []string, quiesce Quiesce) (Group, error) {
	id, _ := p.groupIDFor(name)
	unlockName, err := p.locks.lock(ctx, id)
	if err != nil {
		return Group{}, err
	}
	defer unlockName()
	again, existing := p.groupIDFor(name)
	switch {
	case again != id:
		return Group{}, fmt.Errorf("%w: group snapshot %q is being deleted", ErrBusy, name)
	case existing != nil && !slices.Equal(existing.Volumes, volumes):
		return Group{}, fmt.Errorf("%w: group snapshot %q is one of volumes %q", ErrIncompatible, name, existing.Volumes)
	case existing != nil:
		return p.group(existing), nil
	}
	entries := make([]*entry, len(volumes))
	for i, vol := range volumes {
		if _, _, err := p.record(vol); err != nil {
			return Group{}, err
		}
		unlock, err := p.locks.lock(ctx, vol)
		if err != nil {
			return Group{}, err
		}
		defer unlock()
		if entries[i], _, err = p.record(vol); err != nil {
			return Group{}, err
		}
	}
	rec := groupRecord{ID: id, Name: name, Volumes: volumes, Created: time.Now().UTC(), State: snapshotCreating}
	if err := p.takeGroup(ctx, &rec, entries, quiesce); err != nil {
		p.wakeReaper()
		return Group{}, err
	}
	return p.group(&rec), nil
}

// takeGroup takes the members of rec, from the intent to the commit. The caller
// holds the ID locks of the group and of all volumes.
func (p *Pool) takeGroup(ctx context.Context, rec *groupRecord, entries []*entry, quiesce Quiesce) error {
	members := make([]snapshotRecord, len(entries))
	p.mu.Lock()
	for i, e := range entries {
		members[i] = snapshotRecord{ID: p.memberIDLocked(rec.ID, e.id), Volume: e.id, Group: rec.ID, Filesystem: e.rec.Filesystem}
		rec.Snapshots = append(rec.Snapshots, members[i].ID)
	}
	p.mu.Unlock()
	if err := p.putGroup(*rec); err != nil {
		return err
	}
	members, err := p.takeSnapshots(ctx, entries, members, quiesce)
	if err != nil {
		return err
	}
	for _, m := range members {
		if err := p.writeSnapshot(m); err != nil {
			return err
		}
	}
	rec.State, rec.Created = snapshotReady, members[0].Created
	if err := p.putGroup(*rec); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, e := range entries {
		e.snapshots[members[i].ID] = &members[i]
	}
	return nil
}

// groupIDFor returns the ID of the group snapshot called name and its record, or
// the ID that a new one gets and nil. What an interrupted attempt left is taken up.
func (p *Pool) groupIDFor(name string) (string, *groupRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rec := p.groupNamedLocked(name); rec != nil {
		return rec.ID, rec
	}
	for n := 0; ; n++ {
		id := p.makeID(kindGroup, name, n)
		if rec := p.groups[id]; rec == nil || rec.State == snapshotCreating {
			return id, nil
		}
	}
}

func (p *Pool) groupNamedLocked(name string) *groupRecord {
	for _, rec := range p.groups {
		if rec.State == snapshotReady && rec.Name == name {
			return rec
		}
	}
	return nil
}

// GroupNamed returns the ID of the group snapshot that was created with name.
func (p *Pool) GroupNamed(name string) (id string, exists bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rec := p.groupNamedLocked(name); rec != nil {
		return rec.ID, true
	}
	return "", false
}

// memberIDLocked returns the ID of the snapshot of the volume vol in a new group.
// A member of an earlier group of the same ID may be a tombstone still.
func (p *Pool) memberIDLocked(group, vol string) string {
	for n := 0; ; n++ {
		if id := p.makeID(kindMember, group+" "+vol, n); p.freeLocked(id, vol) {
			return id
		}
	}
}

// putGroup writes the record of a group durably, then into the index.
func (p *Pool) putGroup(rec groupRecord) error {
	if err := durable.WriteRecord(p.dir, groupRecName(rec.ID), groupKind, groupVersion, rec); err != nil {
		return spaceError(err)
	}
	p.mu.Lock()
	p.groups[rec.ID] = &rec
	p.mu.Unlock()
	return nil
}

// group describes a ready group.
func (p *Pool) group(rec *groupRecord) Group {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := Group{ID: rec.ID, Name: rec.Name, Created: rec.Created}
	for _, id := range rec.Snapshots {
		if e := p.snapshots[id]; e != nil { // else its record is lost
			g.Snapshots = append(g.Snapshots, e.snapshots[id].snapshot())
		}
	}
	return g
}

// GetGroup returns the group snapshot id. Errors: ErrNotFound, ErrDamaged.
func (p *Pool) GetGroup(id string) (Group, error) {
	p.mu.Lock()
	rec := p.groups[id]
	p.mu.Unlock()
	switch {
	case rec != nil && rec.damage != nil:
		return Group{}, fmt.Errorf("%w: group snapshot %s: %w", ErrDamaged, id, rec.damage)
	case rec == nil || rec.State != snapshotReady:
		return Group{}, fmt.Errorf("%w: group snapshot %q", ErrNotFound, id)
	}
	return p.group(rec), nil
}

// groupOf returns the ID of the ready group that the snapshot of rec is a member
// of, "" for none.
func (p *Pool) groupOf(rec snapshotRecord) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g := p.groups[rec.Group]; g != nil && g.State == snapshotReady && slices.Contains(g.Snapshots, rec.ID) {
		return g.ID
	}
	return ""
}

// DeleteGroup deletes the group snapshot id with all its members. Clones of them
// go on. Errors: ErrNotFound, ErrDamaged, ErrBusy.
func (p *Pool) DeleteGroup(ctx context.Context, id string) error {
	return detachErr(ctx, p, func(ctx context.Context) error {
		unlock, err := p.locks.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		if _, err := p.GetGroup(id); err != nil {
			return err
		}
		p.mu.Lock()
		rec := *p.groups[id]
		p.mu.Unlock()
		rec.State = snapshotDeleted
		if err := p.putGroup(rec); err != nil {
			return err
		}
		p.mu.Lock()
		p.applyGroupLocked(&rec)
		p.mu.Unlock()
		p.wakeReaper()
		return nil
	})
}

// applyGroupLocked makes the members of rec in the index what rec says. The
// caller holds p.mu.
func (p *Pool) applyGroupLocked(rec *groupRecord) {
	for id, e := range p.snapshots {
		member := e.snapshots[id]
		if member.Group != rec.ID {
			continue
		}
		state := rec.State
		if !slices.Contains(rec.Snapshots, id) {
			state = snapshotCreating // of an attempt that another has followed
		}
		if member.State == snapshotReady && state != snapshotReady {
			next := *member
			next.State = state
			e.snapshots[id] = &next
		}
	}
}

// loadGroups reads the records of the groups and makes the members what they
// say. The members of a damaged one stay what their own records say.
func (p *Pool) loadGroups() error {
	if err := p.dir.Mkdir(groupsDir); err != nil { // of a pool that is older than groups
		return err
	}
	if err := p.dir.RemoveTemporary(groupsDir); err != nil {
		return err
	}
	names, err := p.dir.List(groupsDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		id, isRecord := strings.CutSuffix(name, ".json")
		if !isRecord || !groupIDPattern.MatchString(id) {
			return fmt.Errorf("%w: %s holds %q, which is no record of a group snapshot; move it away", ErrNotPool, groupsDir, name)
		}
		rec := new(groupRecord)
		err := durable.ReadRecord(p.dir, groupRecName(id), groupKind, groupVersion, rec)
		if err == nil && (rec.ID != id || len(rec.Volumes) != len(rec.Snapshots)) {
			err = fmt.Errorf("%w: record %q is that of %q", durable.ErrDamaged, name, rec.ID)
		}
		if isDamage(err) {
			p.groups[id] = &groupRecord{ID: id, damage: err}
			continue
		}
		if err != nil {
			return err
		}
		p.groups[id] = rec
		p.applyGroupLocked(rec) // nobody else knows the pool yet
	}
	return nil
}

// reapGroups removes the records of groups that are not ready and have no member
// left. Those that are being changed wait for the next time.
func (p *Pool) reapGroups() error {
	var errs []error
	for _, id := range p.deadGroups() {
		unlock, ok := p.locks.tryReap(id)
		if !ok {
			continue
		}
		if slices.Contains(p.deadGroups(), id) { // still
			err := p.dir.Remove(groupRecName(id))
			if err == nil {
				p.mu.Lock()
				delete(p.groups, id)
				p.mu.Unlock()
			}
			errs = append(errs, err)
		}
		unlock()
	}
	return errors.Join(errs...)
}

// deadGroups returns the groups whose records nothing needs: no record of a
// snapshot names them. One that cannot be read may.
func (p *Pool) deadGroups() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.volumes {
		if e.rec == nil {
			return nil
		}
	}
	named := make(map[string]bool)
	for id, e := range p.snapshots {
		named[e.snapshots[id].Group] = true
	}
	var ids []string
	for id, rec := range p.groups {
		if rec.damage == nil && rec.State != snapshotReady && !named[id] {
			ids = append(ids, id)
		}
	}
	return ids
}
