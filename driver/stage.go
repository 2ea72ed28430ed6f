package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/internal/meter"
	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// NodeStageVolume implements csi.NodeServer.
func (s nodeServer) NodeStageVolume(ctx context.Context, req *csi.NodeStageVolumeRequest) (*csi.NodeStageVolumeResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), checkPath("staging_target_path", req.GetStagingTargetPath()),
		checkCapability(req.GetVolumeCapability())); err != nil {
		return nil, err
	}
	want := stageHint{
		Volume:      req.GetVolumeId(),
		StagingPath: filepath.Clean(req.GetStagingTargetPath()),
		Block:       req.GetVolumeCapability().GetBlock() != nil,
		Mode:        req.GetVolumeCapability().GetAccessMode().GetMode().String(),
		FSType:      req.GetVolumeCapability().GetMount().GetFsType(),
		Flags:       req.GetVolumeCapability().GetMount().GetMountFlags(),
	}
	return change(ctx, s.Driver, want.Volume, func(ctx context.Context) (*csi.NodeStageVolumeResponse, error) {
		return &csi.NodeStageVolumeResponse{}, s.stage(ctx, want)
	})
}

// stage makes what is staged equal to want. The caller holds the lock of the volume.
func (d *Driver) stage(ctx context.Context, want stageHint) error {
	pool, vol, err := d.get(want.Volume)
	if err != nil {
		return err
	}
	v := d.stagedVolume(want.Volume)
	if v != nil && !v.hint.same(&want) {
		return fmt.Errorf("%w: volume %s is staged at %q with other arguments", errIncompatible, want.Volume, v.hint.StagingPath)
	}
	if v != nil {
		loss := d.lossOf(v)
		if passing(loss) {
			return fmt.Errorf("%w: volume %s: %w", errUnavailable, want.Volume, loss)
		}
		if loss != nil {
			klog.FromContext(ctx).Info("repairing a staged volume", "volumeID", want.Volume, "reason", loss.Error())
			if err := d.release(ctx, v, true); err != nil {
				return err
			}
			want.Generation = v.hint.Generation
			v = nil
		}
	}
	if v == nil {
		if v, err = d.attach(ctx, pool, vol, want); err != nil {
			return err
		}
	}
	if v.hint.Block {
		return nil
	}
	if err := d.mountStaged(ctx, pool, vol, v); err != nil {
		// A final code promises that nothing is attached.
		return d.undone(ctx, v, err)
	}
	return nil
}

// attach opens the image of a volume and makes a device of it.
func (d *Driver) attach(ctx context.Context, pool *volume.Pool, vol volume.Volume, want stageHint) (_ *stagedVolume, err error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	want.BootID, want.Cache = boot, d.opts.CacheID
	want.Generation = max(want.Generation+1, time.Now().UnixMilli())
	v := &stagedVolume{hint: want, loss: errAttaching} // for those who look without the volume's lock
	if err := d.claimPlace(v); err != nil {
		return nil, err
	}
	remembered := false
	defer func() {
		if !remembered {
			d.drop(want.Volume)
		}
	}()
	disk, err := pool.Open(ctx, want.Volume)
	if err != nil {
		return nil, err
	}
	// From now on the content of a raw device is the user's.
	if want.Block && !want.readOnly() && vol.Filesystem.State != volume.FilesystemFormatted {
		if err := pool.SetFilesystem(want.Volume, volume.Filesystem{State: volume.FilesystemForeign}); err != nil {
			return nil, errors.Join(err, disk.Close())
		}
	}
	if err := d.remember(v); err != nil { // before the kernel knows of it
		return nil, errors.Join(err, disk.Close())
	}
	remembered = true
	backend, pause, options := d.exported(pool, disk, vol, &want)
	device, err := d.opts.Attacher.Attach(ctx, backend, options)
	if err != nil {
		pause.giveUp()
		return nil, errors.Join(err, disk.Close(), d.forget(want.Volume))
	}
	attached := &stagedVolume{hint: want, disk: disk, device: device, pause: pause}
	attached.hint.Device = device.Path()
	d.put(attached) // whatever fails now, the device is not lost sight of
	if err := d.remember(attached); err != nil {
		return nil, d.undone(ctx, attached, err)
	}
	klog.FromContext(ctx).V(2).Info("attached", "volumeID", want.Volume, "device", device.Path(), "kind", device.Kind(), "generation", want.Generation)
	return attached, nil
}

// exported returns what a device is made of: the same for the process that attaches it and for one that
// reattaches it. The pausing part of it, if its writes may wait, is given up at the end.
func (d *Driver) exported(pool *volume.Pool, disk *volume.Disk, vol volume.Volume, h *stageHint) (nbdexport.Backend, *pausing, nbdexport.DeviceOptions) {
	image := imagebackend.New(disk.Image, imagebackend.Options{IgnoreDiscard: !vol.Params.Discard, Direct: vol.Params.DirectIO})
	var backend nbdexport.Backend = image
	var pause *pausing
	if pool.Pause() > 0 {
		pause = newPausing(image, pool)
		backend = pause
	}
	return meter.NewBackend(backend, d.meterOf(h.Volume)), pause,
		nbdexport.DeviceOptions{ID: h.deviceID(), ReadOnly: h.Block && h.readOnly(), Discard: vol.Params.Discard}
}

// claimPlace puts v among the staged volumes, or refuses one more than the node may
// have: of those that are staged at once, each counts from here on.
func (d *Driver) claimPlace(v *stagedVolume) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opts.MaxVolumes > 0 && int64(len(d.staged)) >= d.opts.MaxVolumes {
		return fmt.Errorf("%w: %d are staged, which is the limit of node %s (--max-volumes)", errLimit, len(d.staged), d.opts.NodeID)
	}
	d.staged[v.hint.Volume] = v
	return nil
}

// undone releases v after a failure and returns err, which is not final when
// the release failed as well.
func (d *Driver) undone(ctx context.Context, v *stagedVolume, err error) error {
	if undo := d.release(ctx, v, false); undo != nil {
		return fmt.Errorf("%w; %w: %w", err, errUndo, undo)
	}
	return err
}

// mountStaged brings the filesystem of v to its staging path.
func (d *Driver) mountStaged(ctx context.Context, pool *volume.Pool, vol volume.Volume, v *stagedVolume) error {
	mounted, err := d.mountedAt(v, v.hint.StagingPath)
	if err != nil || mounted {
		return err
	}
	device := v.device.Path()
	fstype, err := d.ensureFilesystem(ctx, pool, vol, v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(v.hint.StagingPath, 0o750); err != nil {
		return err
	}
	if err := d.opts.Host.Check(ctx, fstype, device); err != nil {
		return fmt.Errorf("filesystem of volume %s: %w", vol.ID, err)
	}
	// A restore into a larger volume, or an expansion while it was not staged.
	online := d.opts.Host.GrowsMounted(fstype)
	if !online && !v.hint.mountsReadOnly() {
		if err := d.opts.Host.Grow(ctx, fstype, device, ""); err != nil {
			return fmt.Errorf("grow the filesystem of volume %s: %w", vol.ID, err)
		}
	}
	if err := d.opts.Host.Mount(device, v.hint.StagingPath, fstype, stagingOptions(&v.hint, vol, fstype)); err != nil {
		return err
	}
	if !online || v.hint.mountsReadOnly() {
		return nil
	}
	if err := d.opts.Host.Grow(ctx, fstype, device, v.hint.StagingPath); err != nil {
		return fmt.Errorf("grow the filesystem of volume %s: %w", vol.ID, err)
	}
	return nil
}

// stagingOptions are the mount options of a staged volume. A volume's
// filesystem is the user's: its device nodes and set-user-ID programs do not count.
func stagingOptions(h *stageHint, vol volume.Volume, fstype string) []string {
	options := []string{"nosuid", "nodev"}
	if h.readOnly() {
		options = append(options, "ro")
	}
	if fstype == fsXFS && !vol.Source.Empty() && !slices.Contains(h.Flags, "nouuid") {
		options = append(options, "nouuid") // its source may be mounted here too
	}
	return append(options, h.Flags...)
}

// mountedAt reports whether v is mounted at path. Something else there is an error.
func (d *Driver) mountedAt(v *stagedVolume, path string) (bool, error) {
	mounts, err := d.opts.Host.Mounts(path)
	if err != nil || len(mounts) == 0 {
		return false, err
	}
	top := mounts[len(mounts)-1]
	ours, err := d.isOurs(v, path, top)
	if err == nil && !ours {
		err = fmt.Errorf("%w: %q is a mount of something else (%s)", errPrecondition, path, top.Type)
	}
	return ours, err
}

// NodeUnstageVolume implements csi.NodeServer. What is not staged is
// unstaged already, whatever its ID looks like.
func (s nodeServer) NodeUnstageVolume(ctx context.Context, req *csi.NodeUnstageVolumeRequest) (*csi.NodeUnstageVolumeResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), checkPath("staging_target_path", req.GetStagingTargetPath())); err != nil {
		return nil, err
	}
	return change(ctx, s.Driver, req.GetVolumeId(), func(ctx context.Context) (*csi.NodeUnstageVolumeResponse, error) {
		return &csi.NodeUnstageVolumeResponse{}, s.unstage(ctx, req.GetVolumeId(), filepath.Clean(req.GetStagingTargetPath()))
	})
}

func (d *Driver) unstage(ctx context.Context, id, path string) error {
	v := d.stagedVolume(id)
	if v == nil {
		return d.unmountUnknown(id, path)
	}
	if v.hint.StagingPath != path {
		return fmt.Errorf("%w: volume %s is staged at %q", errPrecondition, id, v.hint.StagingPath)
	}
	loss := d.lossOf(v)
	if passing(loss) {
		return fmt.Errorf("%w: volume %s: %w", errUnavailable, id, loss)
	}
	lost := loss != nil
	if !lost {
		for target := range v.hint.Targets {
			published, err := d.isPublished(v, target)
			if err != nil {
				return err
			}
			if published {
				return fmt.Errorf("%w: volume %s is published at %q", errPrecondition, id, target)
			}
		}
	}
	return d.release(ctx, v, lost)
}

// detachTimeout bounds the detach of a device after its caller has left.
const detachTimeout = time.Minute

// release unmounts, detaches and closes v, and forgets it. Of a lost volume the
// mounts are detached whoever uses them: nobody can use them any more. What it
// could not do is left for the next call; who uses the device still may wait for
// space again until then.
func (d *Driver) release(ctx context.Context, v *stagedVolume, lost bool) error {
	v.pause.giveUp() // the kernel unmounts and detaches after the last write
	detached := false
	defer func() {
		if !detached {
			v.pause.resume()
		}
	}()
	paths := []string{v.hint.StagingPath}
	if lost {
		for target := range v.hint.Targets {
			paths = append(paths, target)
		}
	}
	for _, path := range paths {
		if err := d.unmountOurs(v, path, lost); err != nil {
			return err
		}
	}
	var errs []error
	if v.device != nil {
		ctx, cancel := context.WithTimeout(ctx, detachTimeout)
		defer cancel()
		err := v.device.Detach(ctx)
		if err != nil && !errors.Is(err, nbdexport.ErrNotFlushed) && !lost {
			return err
		}
		errs = append(errs, err)
	}
	detached = true
	if v.disk != nil {
		errs = append(errs, v.disk.Close())
	}
	if lost {
		// What could not be written is lost, and was reported by the health RPCs.
		if err := errors.Join(errs...); err != nil {
			klog.FromContext(ctx).Error(err, "releasing a lost volume", "volumeID", v.hint.Volume)
		}
		errs = []error{d.cleanStaleOf(ctx, v.hint.Volume)}
	}
	klog.FromContext(ctx).V(2).Info("detached", "volumeID", v.hint.Volume, "device", v.hint.Device, "lost", lost)
	return errors.Join(append(errs, d.forget(v.hint.Volume))...)
}

// isOurs reports whether the mount m at path is one of v's device. It looks at
// the mount table, never through the mount: its device may be dead.
func (d *Driver) isOurs(v *stagedVolume, path string, m Mount) (bool, error) {
	number, err := d.opts.Host.DeviceNumber(v.hint.Device)
	if err != nil || number == 0 { // nothing was attached yet, or the node is gone
		return false, err
	}
	if !v.hint.Block {
		return number == m.Device, nil
	}
	at, err := d.opts.Host.DeviceNumber(path) // a bound device node
	return at == number, err
}

// unmountOurs takes the mounts of v's device off path. It stops at a mount of
// something else, which is not its business.
func (d *Driver) unmountOurs(v *stagedVolume, path string, lazy bool) error {
	for {
		mounts, err := d.opts.Host.Mounts(path)
		if err != nil || len(mounts) == 0 {
			return err
		}
		if ours, err := d.isOurs(v, path, mounts[len(mounts)-1]); err != nil || !ours {
			return err
		}
		if err := d.opts.Host.Unmount(path, lazy); err != nil {
			return err
		}
	}
}

// unmountAll takes every mount off path.
func (d *Driver) unmountAll(path string) error {
	for {
		mounts, err := d.opts.Host.Mounts(path)
		if err != nil || len(mounts) == 0 {
			return err
		}
		if err := d.opts.Host.Unmount(path, false); err != nil {
			return err
		}
	}
}

// unmountUnknown cleans path of a volume that nothing is remembered of. Only a
// volume of ours can have a mount there that is ours to take away.
func (d *Driver) unmountUnknown(id, path string) error {
	mounts, err := d.opts.Host.Mounts(path)
	if err != nil || len(mounts) == 0 {
		return err
	}
	if _, err := d.pools.of(id); err != nil {
		return fmt.Errorf("%w; %q is a mount of something else", err, path)
	}
	return d.unmountAll(path)
}
