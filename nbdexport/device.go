package nbdexport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"time"

	"csi-qcow2/nbdexport/holder"
)

// Errors that a caller of a [Device] or an [Attacher] can act on.
var (
	// ErrDeviceBusy reports that someone still holds the device open: a mount, a
	// device-mapper table, a process. Nothing was torn down; release it and try again.
	ErrDeviceBusy = errors.New("nbdexport: device is in use")

	// ErrNotFlushed reports that a device was removed, but that what was written to it
	// since the last flush may be lost: its write back or the backend's flush failed.
	ErrNotFlushed = errors.New("nbdexport: last writes to the device are lost")

	// ErrDeviceGone reports that the kernel device is not ours any more: it was
	// disconnected, or its index or backing file now belongs to something else.
	ErrDeviceGone = errors.New("nbdexport: device is gone")

	// ErrDeviceDead reports that the kernel has given the device up: the server side of
	// its FUSE connection died, or no socket is connected. Requests fail or wait.
	ErrDeviceDead = errors.New("nbdexport: device has lost its server")

	// ErrDeviceReconnecting reports that the connection of a device was lost a moment ago, and
	// is being replaced. Requests wait, nothing is lost; try again.
	ErrDeviceReconnecting = errors.New("nbdexport: device is getting a new connection")

	// ErrNoDeviceKind reports that this kernel can make no device of the kind asked for.
	ErrNoDeviceKind = errors.New("nbdexport: no usable block device driver")
)

// The kinds of device, as [NewAttacher] takes them and [Device.Kind] returns them.
const (
	KindAuto = "auto" // nbd where the kernel has it, else fuse
	KindNBD  = "nbd"  // the kernel's nbd driver over a socketpair
	KindFUSE = "fuse" // a loop device over one file in a FUSE mount
)

// DeviceOptions says how a backend appears as a block device.
type DeviceOptions struct {
	// ID names the device for as long as it lives, unique among the devices of the node: the volume
	// ID and the attach generation. With a tag of the run-dir behind it, it is the nbd driver's
	// backend identifier or the name of the FUSE file, and so how a later process finds the device
	// again (see [Attacher.Stale]). 1 to 128 characters of [A-Za-z0-9._-], not starting with a dot.
	ID string

	// ReadOnly makes the kernel refuse writes.
	ReadOnly bool

	// BlockSize is the logical block size, 512 or 4096 bytes. Zero means 512, with which any
	// filesystem made anywhere can be mounted. A size that is not a multiple of it is refused.
	BlockSize int

	// Discard lets the kernel pass discards (fstrim, the discard mount option, blkdiscard,
	// mkfs) to the backend.
	Discard bool
}

// Device is one backend attached as a kernel block device.
//
// Its methods may be called at once from several goroutines. While the process serves a
// device it must not read or write it, nor a filesystem on it, from a thread whose progress
// the serving needs: see "Known deadlocks" in the package comment.
type Device interface {
	// Path is the device node, /dev/nbdN or /dev/loopN. It does not change.
	Path() string

	// Kind is KindNBD or KindFUSE.
	Kind() string

	// Size is the size in bytes that the kernel was last told.
	Size() int64

	// Resize tells the kernel that the backend is now size bytes long. The backend must
	// have grown before. It fails with ErrDeviceDead or ErrDeviceGone when no server is
	// connected or the device is not ours: a resize would hang behind stuck requests.
	Resize(ctx context.Context, size int64) error

	// Detach writes back what the kernel holds for the device, flushes the backend, and removes the
	// device and all that belongs to it. It waits for openers until ctx ends, at most
	// [detachWait], then returns ErrDeviceBusy with the device still served. After nil or
	// ErrNotFlushed the device is gone and the backend gets no more calls; closing it is the
	// caller's. Detaching a detached device is nil.
	Detach(ctx context.Context) error

	// Leave stops serving the device and leaves it with the kernel: requests that were read are
	// answered, but for ErrUnanswered, and the backend gets no more calls. The kernel keeps those and
	// later requests for a process that reattaches it, those of a fuse device while a holder lives. It is for a process
	// that ends; after it no other method but Path may be called.
	Leave()

	// Survives is nil while the device would outlive this process: requests would wait for the next one.
	// Otherwise it says why they would fail.
	Survives() error

	// Health is nil while requests can be served: the kernel device exists, is ours, and its server
	// is connected. It looks at sysfs and asks the driver, never at the device's data, so it never
	// hangs.
	Health() error
}

// AttacherOptions configure an [Attacher].
type AttacherOptions struct {
	// RunDir is a directory of this node process, on a filesystem that does not outlive a
	// reboot, such as /run/csi-qcow2. FUSE mounts live under RunDir/fuse. Two processes that
	// serve at once have different ones. It must be absolute; it is created when absent.
	RunDir string

	// DeadConnTimeout is how long the kernel keeps the requests for an nbd device while no
	// process serves it: the time that a restart may take. After it they fail. Whole seconds,
	// at least 1 s; default 10 min.
	DeadConnTimeout time.Duration

	// Holder is asked to keep the connections of FUSE devices for the next process. Without one
	// they end with this process. It stays the caller's, who closes it after the Attacher.
	Holder *holder.Client
}

func (o AttacherOptions) withDefaults() AttacherOptions {
	o.RunDir = filepath.Clean(o.RunDir)
	o.DeadConnTimeout = cmp.Or(o.DeadConnTimeout, 10*time.Minute)
	return o
}

func (o AttacherOptions) validate() error {
	var errs []error
	if !filepath.IsAbs(o.RunDir) {
		errs = append(errs, fmt.Errorf("nbdexport: run directory %q: want an absolute path", o.RunDir))
	}
	if o.DeadConnTimeout < time.Second || o.DeadConnTimeout%time.Second != 0 {
		errs = append(errs, fmt.Errorf("nbdexport: dead connection timeout %s: want whole seconds, at least one", o.DeadConnTimeout))
	}
	return errors.Join(errs...)
}

// A StaleDevice is a kernel device that a dead predecessor of this process left behind.
type StaleDevice struct {
	ID   string // DeviceOptions.ID it was attached with
	Kind string // KindNBD or KindFUSE
	Path string // device node; empty when only the dead FUSE mount is left

	clean func(ctx context.Context) error
}

// Clean removes the device and what belongs to it when nothing holds it open. With an opener
// (usually a mounted filesystem) left until ctx ends, at most [detachWait], it returns
// ErrDeviceBusy and leaves all as it was: unmount, then call it again.
func (d StaleDevice) Clean(ctx context.Context) error { return d.clean(ctx) }

// deviceIDPattern is what DeviceOptions.ID may be: it becomes a directory name and a netlink
// string.
var deviceIDPattern = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$`)

// withDefaults returns o with zero values replaced.
func (o DeviceOptions) withDefaults() DeviceOptions {
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	return o
}

// validate checks o for a backend of size bytes.
func (o DeviceOptions) validate(size int64) error {
	switch {
	case !deviceIDPattern.MatchString(o.ID):
		return fmt.Errorf("nbdexport: device ID %q: want 1 to 128 characters of [A-Za-z0-9._-], not starting with a dot", o.ID)
	case o.BlockSize != 512 && o.BlockSize != 4096:
		return fmt.Errorf("nbdexport: device %q: block size %d: want 512 or 4096", o.ID, o.BlockSize)
	}
	return o.validateSize(size)
}

// validateSize checks a device size: the kernel would cut off a part of a block.
func (o DeviceOptions) validateSize(size int64) error {
	if size <= 0 || size%int64(o.BlockSize) != 0 {
		return fmt.Errorf("nbdexport: device %q: size %d: want a positive multiple of the block size %d", o.ID, size, o.BlockSize)
	}
	return nil
}
