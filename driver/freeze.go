package driver

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/durable"
	"csi-qcow2/internal/freezer"
	"csi-qcow2/volume"
)

// A snapshot of a mounted filesystem is cut while the filesystem is frozen: it
// needs no recovery then. The way there and back must not leave it frozen:
//
//  1. A record in the run directory says what is about to be frozen.
//  2. A process of its own freezes it, for freezeLimit at most (package freezer).
//     It thaws when this process ends, when the limit has passed, or when asked.
//     It keeps the record locked until it is gone.
//  3. The images are cut, in milliseconds, and the filesystems are thawed.
//  4. The record goes.
//
// When both processes are killed, the next one thaws what records name, at once
// and again when they are not locked any more. A
// filesystem that was thawed too early fails the snapshot, which is undone then.
// The filesystem that holds a pool or the run directory is never frozen: the
// snapshot would wait for itself.

// freezeLimit bounds how long freezing may take, and how long a filesystem stays frozen.
const freezeLimit = 30 * time.Second

// A freezeRecord says what a process was about to freeze.
type freezeRecord struct {
	Volume string `json:"volume"`
	BootID string `json:"bootID"`
	Path   string `json:"path"`   // where it is mounted
	Device uint64 `json:"device"` // device number of the filesystem
}

const (
	freezeKind    = "csi-qcow2 frozen filesystem"
	freezeVersion = 1
	freezesDir    = "frozen"
)

func freezeName(id string) string { return freezesDir + "/" + id + ".json" }

func (r *freezeRecord) origin() (volume, bootID string) { return r.Volume, r.BootID }

// freezeLock is the file that is locked while something freezes the volume id: its record.
func (d *Driver) freezeLock(id string) string { return filepath.Join(d.runDir.Path(), freezeName(id)) }

// A frozenVolume is a staged volume whose filesystem is frozen.
type frozenVolume struct {
	record freezeRecord
	fs     Frozen
	unlock func() // of the volume ID: nobody unmounts it
}

// quiesce returns what freezes the filesystems of the volumes ids that are mounted
// on this node while a cut is made.
func (d *Driver) quiesce(ctx context.Context, ids ...string) volume.Quiesce {
	log := klog.FromContext(ctx)
	return func(ctx context.Context, cut func()) (err error) {
		ctx = klog.NewContext(ctx, log)
		freezing, cancel := context.WithTimeout(ctx, freezeLimit)
		defer cancel()
		var frozen []*frozenVolume
		defer func() {
			for _, f := range slices.Backward(frozen) {
				err = errors.Join(err, d.thaw(ctx, f))
			}
		}()
		for _, id := range slices.Sorted(slices.Values(ids)) {
			f, err := d.freeze(freezing, id)
			if err != nil {
				return fmt.Errorf("volume %s is not frozen: %w", id, err)
			}
			if f != nil {
				frozen = append(frozen, f)
			}
		}
		cut()
		return nil
	}
}

// freeze freezes the filesystem of the volume id, or returns nil when there is
// none to freeze.
func (d *Driver) freeze(ctx context.Context, id string) (_ *frozenVolume, err error) {
	if v := d.stagedVolume(id); v == nil || v.hint.Block {
		return nil, nil
	}
	unlock, ok := d.locks.try(id)
	if !ok {
		return nil, fmt.Errorf("%w on %s", volume.ErrBusy, id)
	}
	held := false
	defer func() {
		if !held {
			unlock()
		}
	}()
	record, err := d.freezable(ctx, id)
	if record == nil || err != nil {
		return nil, err
	}
	d.thawMu.Lock()
	left, err := d.runDir.Exists(freezeName(id))
	d.thawMu.Unlock()
	if err != nil {
		return nil, err
	}
	if left {
		d.thawLater(ctx, *record) // the last try may have come to its limit
		return nil, fmt.Errorf("%w: it is still being thawed from an earlier snapshot", errUnavailable)
	}
	if err := d.runDir.Mkdir(freezesDir); err != nil {
		return nil, err
	}
	if err := durable.WriteRecord(d.runDir, freezeName(id), freezeKind, freezeVersion, record); err != nil {
		return nil, err
	}
	fs, err := d.opts.Host.Freeze(ctx, record.Path, record.Device, freezeLimit, d.freezeLock(id))
	switch {
	case err == nil:
		held = true
		return &frozenVolume{*record, fs, unlock}, nil
	case errors.Is(err, freezer.ErrFrozen): // whoever did it keeps it at rest
		klog.FromContext(ctx).Info("the filesystem is frozen already", "volumeID", id, "stagingPath", record.Path)
		return nil, d.runDir.Remove(freezeName(id))
	case ctx.Err() != nil:
		// The freezer is at it still, and thaws what it has frozen at last.
		d.thawLater(ctx, *record)
		return nil, err
	}
	return nil, errors.Join(fmt.Errorf(`%w: %w; parameter freeze: "false" takes a snapshot without`, errPrecondition, err), d.runDir.Remove(freezeName(id)))
}

// freezable describes the mounted filesystem of the staged volume id, nil for
// none that can and may be frozen. The caller holds its lock.
func (d *Driver) freezable(ctx context.Context, id string) (*freezeRecord, error) {
	v := d.stagedVolume(id)
	if v == nil || v.hint.Block || d.lossOf(v) != nil {
		return nil, nil // what is lost writes nothing
	}
	mounts, err := d.opts.Host.Mounts(v.hint.StagingPath)
	if err != nil || len(mounts) == 0 {
		return nil, err
	}
	device := mounts[len(mounts)-1].Device
	if path, err := d.ownedBy(device); path != "" || err != nil {
		klog.FromContext(ctx).Info("not freezing the filesystem that this process works on", "volumeID", id, "path", path)
		return nil, err
	}
	boot, err := bootID()
	return &freezeRecord{id, boot, v.hint.StagingPath, device}, err
}

// ownedBy returns which of this process's directories is on the filesystem of the
// device, "" for none.
func (d *Driver) ownedBy(device uint64) (string, error) {
	dirs := []string{d.runDir.Path()}
	for _, pool := range d.pools.all() {
		dirs = append(dirs, pool.Path())
	}
	for _, dir := range dirs {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return "", err
		}
		if st.Dev == device {
			return dir, nil
		}
	}
	return "", nil
}

// thaw lets the writers of f go on. Its error says that the cut is worth nothing.
func (d *Driver) thaw(ctx context.Context, f *frozenVolume) error {
	defer f.unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), freezeLimit)
	defer cancel()
	err := f.fs.Thaw(ctx)
	switch {
	case err == nil:
		return d.runDir.Remove(freezeName(f.record.Volume))
	case errors.Is(err, freezer.ErrExpired):
		return errors.Join(fmt.Errorf("%w: volume %s: %w", errUnavailable, f.record.Volume, err), d.runDir.Remove(freezeName(f.record.Volume)))
	}
	d.thawLater(ctx, f.record)
	return fmt.Errorf("%w: volume %s: %w", errUnavailable, f.record.Volume, err)
}

// thawLimit bounds one try to thaw what was left frozen: its device may have to
// be taken over first.
const thawLimit = 10 * time.Minute

// thawLater thaws what record names in the background, unless that is under way.
func (d *Driver) thawLater(ctx context.Context, record freezeRecord) {
	d.thawMu.Lock()
	running := d.thawing[record.Volume]
	d.thawing[record.Volume] = true
	d.thawMu.Unlock()
	if running {
		return
	}
	log := klog.FromContext(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawLimit)
	d.work.Go(func() { // ends when the kernel answers, or with ctx
		defer cancel()
		err := d.opts.Host.ThawLeft(ctx, record.Path, record.Device, d.freezeLock(record.Volume))
		d.thawMu.Lock() // who finds no record finds no thaw either
		defer d.thawMu.Unlock()
		delete(d.thawing, record.Volume)
		if err == nil || d.unmounted(record) {
			err = d.runDir.Remove(freezeName(record.Volume))
		}
		if err != nil {
			log.Error(err, "thaw what was left frozen", "volumeID", record.Volume, "stagingPath", record.Path)
			return
		}
		log.Info("thawed what may have been left frozen", "volumeID", record.Volume, "stagingPath", record.Path)
	})
}

// unmounted reports whether what record names is not mounted there any more.
func (d *Driver) unmounted(record freezeRecord) bool {
	mounts, err := d.opts.Host.Mounts(record.Path)
	return err == nil && !slices.ContainsFunc(mounts, func(m Mount) bool { return m.Device == record.Device })
}

// thawLeft thaws, in the background, what a predecessor may have left frozen.
func (d *Driver) thawLeft(ctx context.Context) error {
	records, err := leftRecords[freezeRecord](ctx, d.runDir, freezesDir, freezeKind, freezeVersion)
	for _, record := range records {
		d.thawLater(ctx, record)
	}
	return err
}
