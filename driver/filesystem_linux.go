package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// The programs behind Host.Format, Check and Grow, with their arguments. The
// devices are ours and the arguments fixed: no user string gets here.

// Format implements Host.
func (linuxHost) Format(ctx context.Context, fstype, device string, zeroed bool) error {
	switch fstype {
	case fsExt4:
		return formatExt4(ctx, device, zeroed)
	case fsXFS:
		return runTool(ctx, "mkfs.xfs", "-f", "-q", "-K", "--", device)
	}
	return fmt.Errorf("%w: filesystem %q", errInvalid, fstype)
}

// prezeroed is the option of mkfs.ext4, since e2fsprogs 1.47, for what is zero already.
const prezeroed = "assume_storage_prezeroed"

// formatExt4 makes an ext4. It writes no empty inode tables, and neither shall the kernel, in the background,
// where they are zero: it would take a 64th of a thin volume's size for nothing. No blocks are reserved: nobody is
// root in a volume.
func formatExt4(ctx context.Context, device string, zeroed bool) error {
	format := func(options string) error {
		return runTool(ctx, "mkfs.ext4", "-F", "-q", "-m", "0", "-E", "nodiscard,"+options, "--", device)
	}
	if zeroed {
		err := format(prezeroed + "=1")
		var tool *ToolError
		if !errors.As(err, &tool) || !strings.Contains(tool.Stderr, "Bad option(s) specified: "+prezeroed) {
			return err
		}
	}
	return format("lazy_itable_init=1,lazy_journal_init=1")
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
	return checkExt4(ctx, device)
}

// checkExt4 runs e2fsck with further flags.
func checkExt4(ctx context.Context, device string, flags ...string) error {
	err := runTool(ctx, "e2fsck", append(append([]string{"-p"}, flags...), "--", device)...)
	var tool *ToolError
	if errors.As(err, &tool) && tool.Status > 0 && tool.Status&^(fsckFixed|fsckReboot) == 0 {
		return nil
	}
	return err
}

// GrowsMounted implements Host. The kernel wants CAP_SYS_RESOURCE for ext4 (see
// ext4_resize_begin), which even root lacks in some containers.
func (linuxHost) GrowsMounted(fstype string) bool {
	if fstype != fsExt4 {
		return true
	}
	return Capable(unix.CAP_SYS_RESOURCE)
}

// Capable reports whether this process has a capability, unix.CAP_*.
func Capable(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

// Grow implements Host. The programs do nothing when there is nothing to do.
// Growing a mounted filesystem is a transaction of its journal; of an unmounted
// ext4 it is not, and resize2fs wants a full check before it.
func (linuxHost) Grow(ctx context.Context, fstype, device, mountpoint string) error {
	switch {
	case fstype == fsExt4 && mountpoint != "":
		return runTool(ctx, "resize2fs", "--", device)
	case fstype == fsExt4:
		if err := checkExt4(ctx, device, "-f"); err != nil {
			return err
		}
		return runTool(ctx, "resize2fs", "--", device)
	case fstype == fsXFS && mountpoint != "":
		return runTool(ctx, "xfs_growfs", "-d", "--", mountpoint)
	}
	return fmt.Errorf("%w: filesystem %q", errInvalid, fstype)
}
