package driver

import (
	"context"
	"time"
)

// A Host is what the node service asks of the operating system. It is the
// border of the unit tests: everything above it runs in them as it is.
type Host interface {
	// Mounts lists what is mounted at target, bottom first.
	Mounts(target string) ([]Mount, error)
	// Mount mounts a filesystem on the device source, or binds source when
	// fstype is "".
	Mount(source, target, fstype string, options []string) error
	// Unmount takes the top mount off target. A lazy unmount succeeds whatever
	// uses the mount, and takes away what is mounted below it too.
	Unmount(target string, lazy bool) error

	// Format makes a filesystem on device, whatever is there. zeroed says that nothing
	// but zeroes is.
	Format(ctx context.Context, fstype, device string, zeroed bool) error
	// Check repairs what can be repaired without loss, and fails otherwise.
	Check(ctx context.Context, fstype, device string) error
	// GrowsMounted reports whether this process may grow a mounted fstype.
	GrowsMounted(fstype string) bool
	// Grow makes a filesystem as large as its device. It is mounted at
	// mountpoint, or not mounted when that is "".
	Grow(ctx context.Context, fstype, device, mountpoint string) error
	// Sync writes back the filesystem mounted at path.
	Sync(path string) error
	// Freeze stops writes to the filesystem mounted at path, which is on the
	// device, for at most limit, whatever happens to this process. The file lock
	// is locked until nothing of that is under way any more. Errors:
	// freezer.ErrFrozen.
	Freeze(ctx context.Context, path string, device uint64, limit time.Duration, lock string) (Frozen, error)
	// ThawLeft thaws the filesystem mounted at path, which is on the device,
	// if a process that has ended has left it frozen, or will: see Freeze for lock.
	ThawLeft(ctx context.Context, path string, device uint64, lock string) error
	// Usage returns the use of the filesystem mounted at path.
	Usage(path string) (Usage, error)

	// DeviceNumber returns the number of the block device path, or 0 when
	// path is no block device or does not exist.
	DeviceNumber(path string) (uint64, error)
	// SetReadOnly makes the kernel refuse writes to device, or take them again.
	SetReadOnly(device string, readOnly bool) error
	// ReadEnds reads the first and the last MiB of device past the page cache.
	ReadEnds(device string) error
}

// A Frozen is a filesystem that does not change; *freezer.Frozen is the one in use.
type Frozen interface {
	// Thaw lets writes go on. freezer.ErrExpired says that they did before.
	Thaw(ctx context.Context) error
}

// A Mount is one mount of the mount table.
type Mount struct {
	Device   uint64 // device number of the filesystem
	Root     string // of the mount inside its filesystem
	Type     string // of the filesystem
	ReadOnly bool   // this mount, whatever its filesystem is
}

// A Usage says how full a filesystem is.
type Usage struct {
	Total, Available, Used         int64 // bytes
	Inodes, InodesFree, InodesUsed int64
}
