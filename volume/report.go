package volume

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"path"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// A Report describes what is in a pool: also what users have deleted and
// something still needs.
type Report struct {
	Pool    string         `json:"pool"` // path
	Volumes []VolumeReport `json:"volumes"`
}

// A VolumeReport describes one volume of a pool. Sizes are in bytes.
type VolumeReport struct {
	ID        string           `json:"id"`
	Name      string           `json:"name,omitempty"`
	Size      int64            `json:"size"`      // virtual
	HostBytes int64            `json:"hostBytes"` // that the host's file system has given to the image
	Created   time.Time        `json:"created,omitzero"`
	Source    Source           `json:"source,omitzero"`
	Reads     string           `json:"reads,omitempty"`    // ID of the snapshot that it shows what it has not overwritten
	Deleted   bool             `json:"deleted,omitempty"`  // users do not see it any more
	Attached  bool             `json:"attached,omitempty"` // its image is open
	Copy      Copy             `json:"copy,omitzero"`
	Problem   string           `json:"problem,omitempty"`
	Usage     *Usage           `json:"usage,omitempty"`
	Snapshots []SnapshotReport `json:"snapshots,omitempty"` // oldest first
}

// A SnapshotReport describes one snapshot of a volume.
type SnapshotReport struct {
	ID      string      `json:"id"`
	Name    string      `json:"name,omitempty"`
	Size    int64       `json:"size"` // virtual, bytes
	Created time.Time   `json:"created"`
	Group   string      `json:"group,omitempty"`
	Hidden  bool        `json:"hidden,omitempty"`  // of the clone of a volume
	Deleted bool        `json:"deleted,omitempty"` // users do not see it any more
	Clones  []string    `json:"clones,omitempty"`  // volumes that read from it
	Usage   *StateUsage `json:"usage,omitempty"`
}

// A Usage says who holds the space in an image, in bytes of whole clusters. See
// qcow2.Usage.
type Usage struct {
	Total    int64      `json:"total"`
	Metadata int64      `json:"metadata"` // no state's
	Shared   int64      `json:"shared"`   // several states', each cluster counted once
	Active   StateUsage `json:"active"`
}

// A StateUsage is what one state of an image refers to, in bytes: alone, and
// together with other states.
type StateUsage struct {
	Unique int64 `json:"unique"` // deleting the state gives it back
	Shared int64 `json:"shared"`
}

// Report describes the pool, with who holds whose space if usage is set: that
// reads the metadata of all images. A volume that cannot be read has a Problem.
func (p *Pool) Report(ctx context.Context, usage bool) (Report, error) {
	return detach(ctx, p, func(ctx context.Context) (Report, error) {
		r := Report{Pool: p.path, Volumes: []VolumeReport{}}
		for _, id := range p.sortedIDs() {
			v, ok := p.reportVolume(id)
			if !ok {
				continue // it has gone meanwhile
			}
			if usage && v.Problem == "" {
				if err := p.reportUsage(ctx, &v); errors.Is(err, ErrNotFound) {
					continue
				} else if err != nil {
					v.Problem = err.Error()
				}
			}
			r.Volumes = append(r.Volumes, v)
		}
		return r, ctx.Err()
	})
}

// reportVolume describes the volume id from the index.
func (p *Pool) reportVolume(id string) (VolumeReport, bool) {
	v := VolumeReport{ID: id, HostBytes: p.hostBytes(id)}
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.volumes[id]
	if e == nil {
		return v, false
	}
	v.Attached = p.images.inUse(id)
	if e.backing != nil {
		v.Reads = e.backing.Snapshot
	}
	if problem := p.problemLocked(e); problem != nil {
		v.Problem = problem.Error()
	}
	if r := e.rec; r != nil {
		v.Name, v.Size, v.Created, v.Source, v.Deleted, v.Copy = r.Name, r.Size, r.Created, r.Source, r.Deleted, r.Copy
	}
	clones := make(map[string][]string)
	for _, other := range p.volumes {
		if other.backing != nil && other.backing.Volume == id {
			clones[other.backing.Snapshot] = append(clones[other.backing.Snapshot], other.id)
		}
	}
	for _, s := range slices.SortedFunc(maps.Values(e.snapshots), func(a, b *snapshotRecord) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
	}) {
		slices.Sort(clones[s.ID])
		v.Snapshots = append(v.Snapshots, SnapshotReport{
			ID: s.ID, Name: s.Name, Size: s.Size, Created: s.Created, Group: s.Group,
			Hidden: s.Hidden, Deleted: s.State == snapshotDeleted, Clones: clones[s.ID],
		})
	}
	return v, true
}

// hostBytes returns what the host's file system has given to the image of the
// volume id, 0 if it does not say.
func (p *Pool) hostBytes(id string) int64 {
	var st unix.Stat_t
	if err := unix.Fstatat(p.dir.Fd(), path.Join(volumeDir(id), diskName), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0
	}
	return st.Blocks * 512
}

// reportUsage reckons the usage of v.
func (p *Pool) reportUsage(ctx context.Context, v *VolumeReport) (err error) {
	unlock, err := p.locks.visit(ctx, v.ID)
	if err != nil {
		return err
	}
	defer unlock()
	d, err := p.openAny(ctx, v.ID)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	u, err := d.Image.SnapshotUsage(ctx)
	if err != nil {
		return err
	}
	state := func(s qcow2.StateUsage) StateUsage { return StateUsage{s.Unique, s.Shared} }
	v.Usage = &Usage{u.Total, u.Metadata, u.Shared, state(u.Active)}
	for _, s := range u.Snapshots {
		for i := range v.Snapshots {
			if v.Snapshots[i].ID == s.Name {
				found := state(s)
				v.Snapshots[i].Usage = &found
			}
		}
	}
	return nil
}
