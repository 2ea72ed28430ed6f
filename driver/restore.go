package driver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"csi-qcow2/internal/durable"
	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// Why a staged volume has no device.
var (
	errReturning = fmt.Errorf("%w: its device waits for this process to take it over", errUnavailable)
	errAttaching = fmt.Errorf("%w: it is being staged", errUnavailable)
	errLost      = errors.New("its device was served by a process that has ended; stage it again")
	errCacheLost = errors.New("what was written and not flushed was lost with the cache of a process that has ended; stage it again")
)

// A returning volume was staged by a predecessor. Its lock is held until it is decided what becomes of it.
type returning struct {
	v      *stagedVolume
	unlock func()
}

// recall reads the hints of a predecessor. Until Restore has dealt with them, RPCs for those volumes are
// answered ABORTED or UNAVAILABLE.
func (d *Driver) recall(ctx context.Context) error {
	hints, err := leftRecords[stageHint](ctx, d.runDir, hintsDir, hintKind, hintVersion)
	for _, hint := range hints {
		unlock, _ := d.locks.try(hint.Volume) // nobody else is there yet
		v := &stagedVolume{hint: hint, loss: errReturning}
		d.put(v)
		d.returning = append(d.returning, returning{v, unlock})
	}
	return err
}

// Restore takes over the devices of a predecessor: it opens their images and serves them, all volumes
// at once, so that a slow one holds up no other. What it cannot take over is left to the health RPCs, and
// to stage and unstage. Then it removes devices that nobody knows and nothing holds. The owner of the
// driver calls it once; RPCs may be served meanwhile. It returns early when ctx ends.
func (d *Driver) Restore(ctx context.Context) {
	if err := d.thawLeft(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "thawing what was left frozen")
	}
	var workers sync.WaitGroup
	for _, r := range d.returning { // as many as were staged
		workers.Go(func() {
			defer r.unlock()
			d.restoreOne(ctx, r.v)
		})
	}
	workers.Wait()
	d.returning = nil
	d.removeUnknown(ctx)
}

// tidyInterval is the time between two looks for devices that nobody knows.
const tidyInterval = time.Minute

// Tidy removes, over and over until ctx ends, devices that nobody knows and nothing holds any more, such as
// one of a volume that was lost and staged again while somebody still had it open. It is for after Restore.
func (d *Driver) Tidy(ctx context.Context) {
	ticker := time.NewTicker(tidyInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			d.removeUnknown(ctx)
		}
	}
}

// removeUnknown removes devices of ended processes that nobody knows and nothing holds. What a hint knows is
// still mounted most likely: it waits for stage or unstage.
func (d *Driver) removeUnknown(ctx context.Context) {
	err := d.cleanStale(ctx, func(deviceID string) bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		for _, v := range d.staged {
			if v.hint.deviceID() == deviceID {
				return false
			}
		}
		return true
	})
	if err != nil {
		klog.FromContext(ctx).Error(err, "removing devices of ended processes")
	}
}

const (
	// restoreWait bounds how long a volume is tried again that cannot be taken over for a
	// reason that may pass: its filesystem waits, and nobody stages it again while it is mounted.
	restoreWait = 10 * time.Minute
	// restorePause is the time between two attempts.
	restorePause = time.Second
)

// restoreOne decides what becomes of a volume that was staged. The caller holds its lock.
func (d *Driver) restoreOne(ctx context.Context, v *stagedVolume) {
	log := klog.FromContext(ctx).WithValues("volumeID", v.hint.Volume)
	trying, cancel := context.WithTimeout(ctx, restoreWait)
	defer cancel()
	for {
		restored, err := d.reattach(trying, v)
		if err == nil {
			d.put(restored)
			log.Info("took over a staged volume", "stagingPath", v.hint.StagingPath, "device", restored.hint.Device)
			return
		}
		if final(err) || trying.Err() != nil {
			d.put(&stagedVolume{hint: v.hint, loss: err})
			if ctx.Err() == nil { // else the next process may take it over
				err = errors.Join(err, d.opts.Attacher.Abandon(v.hint.deviceID()))
			}
			log.Error(err, "a staged volume has lost its device", "stagingPath", v.hint.StagingPath, "device", v.hint.Device)
			return
		}
		log.Error(err, "a staged volume is not back yet", "stagingPath", v.hint.StagingPath, "device", v.hint.Device)
		select {
		case <-trying.Done():
		case <-time.After(restorePause):
		}
	}
}

// final reports whether it is of no use to try a takeover again that failed with err.
func final(err error) bool {
	for _, target := range []error{errLost, errCacheLost, nbdexport.ErrDeviceGone, nbdexport.ErrDeviceDead,
		volume.ErrNotFound, volume.ErrDamaged, qcow2.ErrCorrupt, qcow2.ErrNotQcow2} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// passing reports whether loss, of lossOf, ends by itself.
func passing(loss error) bool {
	return errors.Is(loss, errReturning) || errors.Is(loss, nbdexport.ErrDeviceReconnecting)
}

// reattach opens the image of v and serves its device.
func (d *Driver) reattach(ctx context.Context, v *stagedVolume) (_ *stagedVolume, err error) {
	if v.hint.Lost || v.hint.Cache != d.opts.CacheID {
		return nil, errCacheLost
	}
	if _, err := d.pools.here(v.hint.Volume); err != nil {
		return nil, err
	}
	pool, vol, err := d.get(v.hint.Volume)
	if err != nil {
		return nil, err
	}
	disk, err := pool.Open(ctx, v.hint.Volume)
	if err != nil {
		return nil, err
	}
	backend, pause, options := d.exported(pool, disk, vol, &v.hint)
	device, err := d.opts.Attacher.Reattach(ctx, backend, options)
	if err != nil {
		pause.giveUp()
		if errors.Is(err, nbdexport.ErrDeviceGone) {
			err = fmt.Errorf("%w: %w", errLost, err)
		}
		return nil, errors.Join(err, disk.Close())
	}
	next := &stagedVolume{hint: v.hint, disk: disk, device: device, pause: pause}
	if next.hint.Device != device.Path() { // the predecessor died before it knew
		next.hint.Device = device.Path()
		if err := d.remember(next); err != nil {
			klog.FromContext(ctx).Error(err, "writing a hint", "volumeID", v.hint.Volume)
		}
	}
	return next, nil
}

// leave lets go of v for the next process: what was read is answered, but for writes that wait for space, the
// image is flushed and closed, and the kernel keeps the device, those writes and later requests.
func (d *Driver) leave(v *stagedVolume) error {
	if v.device == nil {
		return nil
	}
	if v.device.Survives() == nil {
		v.pause.leave()
	} else {
		v.pause.giveUp()
	}
	v.device.Leave()
	err := errors.Join(v.disk.Image.Flush(), v.disk.Close())
	if err != nil {
		// What the filesystem believes to be written is not: the next process must not go on as if it were.
		v.hint.Lost = true
		err = errors.Join(err, durable.WriteRecord(d.runDir, hintName(v.hint.Volume), hintKind, hintVersion, v.hint))
	}
	return err
}
