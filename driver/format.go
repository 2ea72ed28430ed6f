package driver

import (
	"context"
	"fmt"

	"k8s.io/klog/v2"

	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// mkfs destroys what is on a volume, and a device that cannot be read looks
// empty to blkid. So the look of the device never decides. These rules do:
//
//  1. A clone or a restore is never formatted: it holds what its source held.
//  2. A volume whose record says "formatted", or that was ever exposed as a raw
//     device, is never formatted.
//  3. A volume that nobody has written to is formatted: its record says so, and
//     none of its clusters is allocated; of one that was allocated in advance both
//     ends, where all that can be mounted or assembled has its mark, are zero.
//  4. A volume whose record says "formatting" is formatted again: mkfs was
//     interrupted, and nothing was ever mounted.
//  5. The record says "formatting" durably before mkfs starts, and "formatted"
//     durably before the first mount.
//  6. Both ends of the device must be readable, or mkfs does not start.

// ensureFilesystem returns the type of the filesystem of v, and makes it first
// where the rules allow it.
func (d *Driver) ensureFilesystem(ctx context.Context, pool *volume.Pool, vol volume.Volume, v *stagedVolume) (string, error) {
	fstype := v.hint.FSType
	known := vol.Filesystem
	if known.State == volume.FilesystemFormatted {
		if fstype != "" && fstype != known.Type {
			return "", fmt.Errorf("%w: volume %s has an %s filesystem, not %s", errPrecondition, vol.ID, known.Type, fstype)
		}
		return known.Type, nil
	}
	if fstype == "" {
		fstype = fsExt4
	}
	if known.State == volume.FilesystemForeign {
		return fstype, nil // what the user wrote; mount says whether it is that
	}
	if !vol.Source.Empty() {
		return "", fmt.Errorf("%w: volume %s is a clone of a volume without a filesystem; a clone is never formatted", errPrecondition, vol.ID)
	}
	if v.hint.readOnly() {
		return "", fmt.Errorf("%w: volume %s has no filesystem and is staged read-only", errPrecondition, vol.ID)
	}
	if err := mayFormat(ctx, vol, v); err != nil {
		return "", err
	}
	if err := d.opts.Host.ReadEnds(v.device.Path()); err != nil {
		return "", fmt.Errorf("volume %s is not formatted, its device cannot be read: %w", vol.ID, err)
	}
	// Of what was allocated in advance only the ends are known, and what mkfs has left is no zeroes.
	zeroed := known.State != volume.FilesystemFormatting && vol.Params.Preallocation == qcow2.PreallocationOff
	return fstype, d.format(ctx, pool, vol.ID, fstype, v.device.Path(), zeroed)
}

// mayFormat applies rule 3 to a volume that rules 1 and 2 allow to format.
func mayFormat(ctx context.Context, vol volume.Volume, v *stagedVolume) error {
	if vol.Filesystem.State == volume.FilesystemFormatting {
		return nil
	}
	written, err := false, error(nil)
	if vol.Params.Preallocation == qcow2.PreallocationOff {
		written, err = v.disk.Written(ctx)
	} else {
		written, err = marked(v.disk.Image)
	}
	if err != nil {
		return err
	}
	if written {
		return fmt.Errorf("%w: volume %s holds data that this driver did not write; it is not formatted", errPrecondition, vol.ID)
	}
	return nil
}

// marked reports whether there is anything in the first or the last MiB of image.
func marked(image *qcow2.Image) (bool, error) {
	b := qcow2.GetBuffer(int(min(endBytes, image.Size())))
	defer qcow2.PutBuffer(b)
	for _, off := range []int64{0, image.Size() - int64(len(b))} {
		if _, err := image.ReadAt(b, off); err != nil || !qcow2.IsZero(b) {
			return err == nil, err
		}
	}
	return false, nil
}

// format makes the filesystem, between its two records.
func (d *Driver) format(ctx context.Context, pool *volume.Pool, id, fstype, device string, zeroed bool) error {
	if err := pool.SetFilesystem(id, volume.Filesystem{State: volume.FilesystemFormatting, Type: fstype}); err != nil {
		return err
	}
	klog.FromContext(ctx).V(2).Info("formatting", "volumeID", id, "device", device, "fsType", fstype)
	if err := d.opts.Host.Format(ctx, fstype, device, zeroed); err != nil {
		return fmt.Errorf("format volume %s: %w", id, err)
	}
	return pool.SetFilesystem(id, volume.Filesystem{State: volume.FilesystemFormatted, Type: fstype})
}
