package driver

import (
	"context"
	"errors"
	"fmt"
)

// The programs behind Host.Format, Check and Grow, with their arguments. The
// devices are ours and the arguments fixed: no user string gets here.

// Format implements Host.
func (linuxHost) Format(ctx context.Context, fstype, device string) error {
	switch fstype {
	case fsExt4:
		// No reserved blocks: nobody is root in a volume. Lazy initialisation
		// would write in the background what a thin image never needs.
		return runTool(ctx, "mkfs.ext4", "-F", "-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "--", device)
	case fsXFS:
		return runTool(ctx, "mkfs.xfs", "-f", "-q", "-K", "--", device)
	}
	return fmt.Errorf("%w: filesystem %q", errInvalid, fstype)
}

// The exit status of e2fsck is a sum of these.
const (
	fsckFixed  = 1 // errors corrected
	fsckReboot = 2 // corrected, and a mounted root needs a reboot
)

// Check implements Host. XFS replays its log when it is mounted; there is no
// repair without loss beyond that.
func (linuxHost) Check(ctx context.Context, fstype, device string) error {
	if fstype != fsExt4 {
		return nil
	}
	err := runTool(ctx, "e2fsck", "-p", "--", device)
	var tool *ToolError
	if errors.As(err, &tool) && tool.Status > 0 && tool.Status&^(fsckFixed|fsckReboot) == 0 {
		return nil
	}
	return err
}

// Grow implements Host. Both programs do nothing when there is nothing to do.
func (linuxHost) Grow(ctx context.Context, fstype, device, mountpoint string) error {
	switch fstype {
	case fsExt4:
		return runTool(ctx, "resize2fs", "--", device)
	case fsXFS:
		return runTool(ctx, "xfs_growfs", "-d", "--", mountpoint)
	}
	return fmt.Errorf("%w: filesystem %q", errInvalid, fstype)
}
