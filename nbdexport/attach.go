package nbdexport

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/durable"
)

// detachWait bounds how long Detach and Clean wait for the last opener of a device: udev and
// blkid look at a device for some milliseconds after every change of it.
const detachWait = 10 * time.Second

// An attachDriver makes devices of one kind.
type attachDriver interface {
	// usable returns why the kernel can make no such device, as ErrNoDeviceKind.
	usable() error
	attach(ctx context.Context, b Backend, o DeviceOptions) (Device, error)
	// reattach goes on with the device that an ended process has attached with o.ID.
	reattach(ctx context.Context, b Backend, o DeviceOptions) (Device, error)
	// stale lists the devices of this run-dir that no process serves, usable or not. live holds the
	// IDs that this process serves.
	stale(ctx context.Context, live map[string]bool) ([]StaleDevice, error)
}

// Attacher makes kernel block devices out of backends. Its methods may be called at once.
type Attacher struct {
	kind    string
	dir     *durable.Dir            // RunDir
	drivers map[string]attachDriver // by kind

	mu     sync.Mutex
	live   map[string]*attached // by DeviceOptions.ID; guarded by mu
	closed bool                 // guarded by mu
}

// attached is a device in the attacher's table; it leaves the table when Detach succeeds.
type attached struct {
	Device
	a  *Attacher
	id string
}

// deviceNames makes the name under which the kernel shows a device, ID@tag. The tag is of the
// run-dir, so that a process takes no device of another one for its own: of the directory itself, not of its
// path, which may be another directory in the next container of the same kernel.
type deviceNames struct{ suffix string }

func newDeviceNames(runDir *durable.Dir) (deviceNames, error) {
	var st unix.Stat_t
	if err := unix.Fstat(runDir.Fd(), &st); err != nil {
		return deviceNames{}, &os.PathError{Op: "stat", Path: runDir.Path(), Err: err}
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d:%d", st.Dev, st.Ino)) // devices do not outlive a reboot either
	return deviceNames{suffix: "@" + hex.EncodeToString(sum[:4])}, nil
}

// name is the name of the device with an ID.
func (n deviceNames) name(id string) string { return id + n.suffix }

// id is the ID of the device with a name, when it is one of this run-dir's.
func (n deviceNames) id(name string) (string, bool) { return strings.CutSuffix(name, n.suffix) }

// loadModule asks for a kernel module. It is a try: the driver may be built in, or modprobe or the
// modules may not be there; whether the driver works is seen by using it.
func loadModule(name string) {
	if path, err := exec.LookPath("modprobe"); err == nil {
		_ = exec.Command(path, "-q", name).Run() // the answer is the driver's presence
	}
}

// NewAttacher returns an Attacher for devices of a kind: KindAuto, KindNBD or KindFUSE. It
// returns ErrNoDeviceKind when the kernel cannot make such a device, saying what is missing.
func NewAttacher(kind string, o AttacherOptions) (_ *Attacher, err error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	kinds := []string{kind}
	switch kind {
	case KindNBD, KindFUSE:
	case KindAuto:
		kinds = []string{KindNBD, KindFUSE}
	default:
		return nil, fmt.Errorf("nbdexport: device kind %q: want %s, %s or %s", kind, KindAuto, KindNBD, KindFUSE)
	}
	if err := os.MkdirAll(o.RunDir, 0o700); err != nil {
		return nil, err
	}
	dir, err := durable.OpenDir(o.RunDir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dir.Close())
		}
	}()
	names, err := newDeviceNames(dir)
	if err != nil {
		return nil, err
	}
	nbd, err := newNBDDriver(dir, names, o.DeadConnTimeout)
	if err != nil {
		return nil, err
	}
	a := &Attacher{
		dir:     dir,
		drivers: map[string]attachDriver{KindNBD: nbd, KindFUSE: newFUSEDriver(o.RunDir, names, o.Holder)},
		live:    make(map[string]*attached),
	}
	var errs []error
	for _, kind := range kinds {
		err := a.drivers[kind].usable()
		if err == nil {
			a.kind = kind
			return a, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// Kind is the kind of device that a makes: KindNBD or KindFUSE.
func (a *Attacher) Kind() string { return a.kind }

// Attach makes a device of b and serves it until it is detached. b must not be closed before
// that. When Attach returns, the device node exists and has b's size.
//
// Ending ctx gives up an attach that has not completed; it does not touch the device afterwards.
func (a *Attacher) Attach(ctx context.Context, b Backend, o DeviceOptions) (Device, error) {
	return a.enter("attach", b, o, func(o DeviceOptions) (Device, error) { return a.drivers[a.kind].attach(ctx, b, o) })
}

// Reattach goes on with the device that an ended process of the same run-dir has attached with o.ID,
// and that the kernel has kept: with the same options, and a backend that has all that was
// acknowledged. When it returns, requests that have waited are being answered.
//
// It returns ErrDeviceGone when there is no such device, and ErrDeviceDead for one that has lost
// requests for want of a server. Ending ctx gives the attempt up.
func (a *Attacher) Reattach(ctx context.Context, b Backend, o DeviceOptions) (Device, error) {
	return a.enter("reattach", b, o, func(o DeviceOptions) (Device, error) {
		dev, err := a.drivers[KindNBD].reattach(ctx, b, o)
		if errors.Is(err, ErrDeviceGone) {
			var fuseErr error
			dev, fuseErr = a.drivers[KindFUSE].reattach(ctx, b, o)
			err = errors.Join(ignoring(err, ErrDeviceGone), fuseErr)
		}
		return dev, err
	})
}

// Abandon gives up a device of an ended process that is not to be taken over: requests for it fail
// that would wait, and those that were under way at its end, which the nbd driver keeps for ever
// otherwise. Whoever has it open sees errors.
func (a *Attacher) Abandon(id string) error {
	a.mu.Lock()
	live := a.live[id] != nil
	a.mu.Unlock()
	if live {
		return nil
	}
	var errs []error
	if nbd, ok := a.drivers[KindNBD].(*nbdDriver); ok {
		errs = append(errs, nbd.abandon(id))
	}
	if fuse, ok := a.drivers[KindFUSE].(*fuseDriver); ok {
		errs = append(errs, fuse.drop(fuse.names.name(id)))
	}
	return errors.Join(errs...)
}

// enter makes a device of b by connect and takes it into the table.
func (a *Attacher) enter(what string, b Backend, o DeviceOptions, connect func(DeviceOptions) (Device, error)) (Device, error) {
	o = o.withDefaults()
	if err := o.validate(b.Size()); err != nil {
		return nil, err
	}
	// The entry stands in the table before the device exists, so that no two attaches share
	// an ID and Stale does not take a device in the making for a dead one.
	d := &attached{a: a, id: o.ID}
	a.mu.Lock()
	switch {
	case a.closed:
		a.mu.Unlock()
		return nil, errors.New("nbdexport: attacher is closed")
	case a.live[o.ID] != nil:
		a.mu.Unlock()
		return nil, fmt.Errorf("nbdexport: device %q is attached already", o.ID)
	}
	a.live[o.ID] = d
	a.mu.Unlock()

	dev, err := connect(o)
	if err != nil {
		a.forget(d)
		return nil, fmt.Errorf("%s %q: %w", what, o.ID, err)
	}
	d.Device = dev
	return d, nil
}

// Detach detaches the device and frees its ID.
func (d *attached) Detach(ctx context.Context) error {
	err := d.Device.Detach(ctx)
	if err == nil || errors.Is(err, ErrNotFlushed) {
		d.a.forget(d)
	}
	if err != nil {
		return fmt.Errorf("detach %q: %w", d.id, err)
	}
	return nil
}

// Leave leaves the device and frees its ID.
func (d *attached) Leave() {
	d.Device.Leave()
	d.a.forget(d)
}

// forget takes d from the table, unless another device has its ID by now.
func (a *Attacher) forget(d *attached) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.live[d.id] == d {
		delete(a.live, d.id)
	}
}

// Stale lists the devices, of every kind, that a dead predecessor with the same run-dir left:
// loop devices over a dead FUSE mount, dead FUSE mounts without one, and nbd devices with our
// backend identifiers. It reports what it found even when it returns an error as well.
func (a *Attacher) Stale(ctx context.Context) ([]StaleDevice, error) {
	a.mu.Lock()
	live := make(map[string]bool, len(a.live))
	for id := range a.live {
		live[id] = true
	}
	a.mu.Unlock()
	var found []StaleDevice
	var errs []error
	for _, kind := range []string{KindNBD, KindFUSE} {
		devices, err := a.drivers[kind].stale(ctx, live)
		found = append(found, devices...)
		errs = append(errs, err)
	}
	return found, errors.Join(errs...)
}

// Run keeps the record of what is served up to date, and what is held, without which a later process
// cannot reattach; it returns when ctx ends.
func (a *Attacher) Run(ctx context.Context) {
	var workers sync.WaitGroup
	defer workers.Wait()
	if fuse, ok := a.drivers[KindFUSE].(*fuseDriver); ok && fuse.holder != nil {
		workers.Go(func() { fuse.holder.Run(ctx) })
	}
	if nbd, ok := a.drivers[KindNBD].(*nbdDriver); ok {
		nbd.run(ctx)
	}
}

// Close refuses further attaches. It returns ErrDeviceBusy when devices are still attached;
// they go on being served.
func (a *Attacher) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	if n := len(a.live); n > 0 {
		return fmt.Errorf("close attacher: %d devices attached: %w", n, ErrDeviceBusy)
	}
	return a.dir.Close()
}

// checkResize checks whether the kernel may be told that d is size bytes long now.
func checkResize(d Device, o DeviceOptions, b Backend, size int64) error {
	if err := o.validateSize(size); err != nil {
		return err
	}
	if size < d.Size() {
		return fmt.Errorf("nbdexport: new size %d is smaller than %d", size, d.Size())
	}
	if size > b.Size() {
		return fmt.Errorf("nbdexport: new size %d is beyond the end of the backend at %d", size, b.Size())
	}
	return d.Health()
}
