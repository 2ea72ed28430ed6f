package driver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// NodePublishVolume implements csi.NodeServer.
func (s nodeServer) NodePublishVolume(ctx context.Context, req *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), checkPath("target_path", req.GetTargetPath()),
		checkCapability(req.GetVolumeCapability())); err != nil {
		return nil, err
	}
	mode := req.GetVolumeCapability().GetAccessMode().GetMode()
	want := target{
		ReadOnly: req.GetReadonly() || mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		Mode:     mode.String(),
	}
	block := req.GetVolumeCapability().GetBlock() != nil
	return change(ctx, s.Driver, req.GetVolumeId(), func(ctx context.Context) (*csi.NodePublishVolumeResponse, error) {
		if _, _, err := s.get(req.GetVolumeId()); err != nil {
			return nil, err
		}
		v := s.stagedVolume(req.GetVolumeId())
		switch {
		case v == nil || req.GetStagingTargetPath() == "" || v.hint.StagingPath != filepath.Clean(req.GetStagingTargetPath()):
			return nil, fmt.Errorf("%w: volume %s is not staged at %q", errPrecondition, req.GetVolumeId(), req.GetStagingTargetPath())
		case v.hint.Block != block:
			return nil, fmt.Errorf("%w: volume %s is staged with another access type", errPrecondition, req.GetVolumeId())
		}
		loss := s.lossOf(v)
		if passing(loss) {
			return nil, fmt.Errorf("%w: volume %s: %w", errUnavailable, req.GetVolumeId(), loss)
		}
		if loss != nil {
			return nil, fmt.Errorf("%w: volume %s: %w", errPrecondition, req.GetVolumeId(), loss)
		}
		return &csi.NodePublishVolumeResponse{}, s.publish(v, filepath.Clean(req.GetTargetPath()), want)
	})
}

// publish makes the staged volume v visible at path. The caller holds the lock
// of the volume.
func (d *Driver) publish(v *stagedVolume, path string, want target) error {
	if known, exists := v.hint.Targets[path]; exists && known != want {
		return fmt.Errorf("%w: volume %s is published at %q with other arguments", errIncompatible, v.hint.Volume, path)
	}
	published, err := d.isPublished(v, path)
	if err != nil {
		return err
	}
	if err := d.checkOthers(v, path, want); err != nil {
		return err
	}
	next := v.withTargets()
	next.hint.Targets[path] = want
	if err := d.remember(next); err != nil { // before the kernel knows of it
		return err
	}
	if published {
		return nil
	}
	if v.hint.Block {
		err = d.publishBlock(v, path, want)
	} else {
		err = d.publishFilesystem(v, path, want)
	}
	if err != nil {
		if undo := d.unpublish(next, path); undo != nil {
			return fmt.Errorf("%w; %w: %w", err, errUndo, undo)
		}
	}
	return err
}

// checkOthers applies the access mode to the other targets of v.
func (d *Driver) checkOthers(v *stagedVolume, path string, want target) error {
	for other, t := range v.hint.Targets {
		if other == path {
			continue
		}
		published, err := d.isPublished(v, other)
		if err != nil {
			return err
		}
		if !published {
			continue
		}
		if want.Mode != csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER.String() {
			return fmt.Errorf("%w: volume %s is published at %q, and %s allows one target", errPrecondition, v.hint.Volume, other, want.Mode)
		}
		if v.hint.Block && t.ReadOnly != want.ReadOnly {
			return fmt.Errorf("%w: block volume %s is published at %q, and a device is read-only for all or for none", errPrecondition, v.hint.Volume, other)
		}
	}
	return nil
}

// publishFilesystem binds the staging path to path.
func (d *Driver) publishFilesystem(v *stagedVolume, path string, want target) error {
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	options := []string{"bind"}
	if want.ReadOnly {
		options = append(options, "ro")
	}
	return d.opts.Host.Mount(v.hint.StagingPath, path, "", options)
}

// publishBlock binds the device node of v to the file path.
func (d *Driver) publishBlock(v *stagedVolume, path string, want target) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o660)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if !v.hint.readOnly() { // else the device was attached read-only
		if err := d.opts.Host.SetReadOnly(v.device.Path(), want.ReadOnly); err != nil {
			return err
		}
	}
	return d.opts.Host.Mount(v.device.Path(), path, "", []string{"bind"})
}

// isPublished reports whether v is visible at path as its target says. A bind
// that was not yet made read-only when a process died is taken away, to be made again.
func (d *Driver) isPublished(v *stagedVolume, path string) (bool, error) {
	mounted, err := d.mountedAt(v, path)
	if err != nil || !mounted || v.hint.Block || !v.hint.Targets[path].ReadOnly {
		return mounted, err
	}
	mounts, err := d.opts.Host.Mounts(path)
	if err != nil || mounts[len(mounts)-1].ReadOnly {
		return err == nil, err
	}
	return false, d.unmountOurs(v, path, false)
}

// NodeUnpublishVolume implements csi.NodeServer. What is not published is
// unpublished already, whatever its ID looks like.
func (s nodeServer) NodeUnpublishVolume(ctx context.Context, req *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if err := firstOf(required("volume_id", req.GetVolumeId()), checkPath("target_path", req.GetTargetPath())); err != nil {
		return nil, err
	}
	path := filepath.Clean(req.GetTargetPath())
	return change(ctx, s.Driver, req.GetVolumeId(), func(context.Context) (*csi.NodeUnpublishVolumeResponse, error) {
		resp := &csi.NodeUnpublishVolumeResponse{}
		if v := s.stagedVolume(req.GetVolumeId()); v != nil {
			return resp, s.unpublish(v, path)
		}
		if err := s.unmountUnknown(req.GetVolumeId(), path); err != nil {
			return nil, err
		}
		if _, err := s.pools.of(req.GetVolumeId()); err != nil {
			return resp, nil // nothing of ours is there
		}
		return resp, removeTarget(path)
	})
}

// unpublish takes the target path of v away.
func (d *Driver) unpublish(v *stagedVolume, path string) error {
	loss := d.lossOf(v)
	if err := d.unmountOurs(v, path, loss != nil && !passing(loss)); err != nil {
		return err
	}
	if mounts, err := d.opts.Host.Mounts(path); err != nil || len(mounts) > 0 {
		return firstOf(err, fmt.Errorf("%w: %q is a mount of something else", errPrecondition, path))
	}
	if err := removeTarget(path); err != nil {
		return err
	}
	if _, known := v.hint.Targets[path]; !known {
		return nil
	}
	next := v.withTargets()
	delete(next.hint.Targets, path)
	return d.remember(next)
}

// removeTarget removes the empty file or directory that publish made. Anything
// else is not ours to remove.
func removeTarget(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() && (!info.Mode().IsRegular() || info.Size() > 0) {
		return fmt.Errorf("%w: %q is not a target of a volume", errPrecondition, path)
	}
	return os.Remove(path)
}
