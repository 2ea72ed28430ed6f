package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/durable"
)

// nbdIOTimeout is how often the driver looks at a request that takes long. With one socket and
// TIMEOUT 0 a look never fails or resends it, unless the socket was replaced since:
// so this, and the second to which the kernel rounds, is the pause after a reconnect for what
// was in flight.
const nbdIOTimeout = time.Second

// nbdDriver makes devices of the kernel's nbd driver.
type nbdDriver struct {
	names   deviceNames
	timeout time.Duration // requests wait so long for a server
	served  *served

	mu      sync.Mutex
	devices map[*nbdDevice]bool // those that are served; guarded by mu
}

func newNBDDriver(dir *durable.Dir, names deviceNames, timeout time.Duration) (*nbdDriver, error) {
	served, err := openServed(dir)
	if err != nil {
		return nil, err
	}
	return &nbdDriver{names: names, timeout: timeout, served: served, devices: make(map[*nbdDevice]bool)}, nil
}

func (d *nbdDriver) usable() error {
	loadModule("nbd")
	n, err := dialNBD()
	if err != nil {
		return fmt.Errorf("%w: nbd: %w (it needs the kernel's nbd driver, and root)", ErrNoDeviceKind, err)
	}
	return n.close()
}

func (d *nbdDriver) newDevice(b Backend, o DeviceOptions) *nbdDevice {
	return &nbdDevice{driver: d, opts: o, backend: b, connected: make(chan struct{}),
		export: Export{Name: o.ID, Backend: b, ReadOnly: o.ReadOnly}}
}

func (d *nbdDriver) attach(ctx context.Context, b Backend, o DeviceOptions) (_ Device, err error) {
	client, server, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer client.Close() // the kernel has its own reference; ours would hide the end of the connection
	dev := d.newDevice(b, o)
	dev.size.Store(b.Size())
	// Serve before CONNECT: the kernel may read the device before it answers.
	dev.serve(context.WithoutCancel(ctx), server)
	// A CONNECT that has begun is seen to its end, whoever waits for it.
	place, err := nbdConnect(context.WithoutCancel(ctx), nbdConfig{
		Index:           nbdAnyIndex,
		Size:            b.Size(),
		BlockSize:       o.BlockSize,
		Flags:           kernelFlags(o),
		DeadConnTimeout: d.timeout,
		Backend:         d.names.name(o.ID),
	}, client)
	if err != nil {
		dev.stop()
		return nil, err
	}
	if err := d.adopt(dev, place); err != nil {
		_, undo := d.remove(ctx, place, false)
		dev.stop()
		return nil, errors.Join(err, undo)
	}
	return dev, nil
}

// adopt enters a device that the kernel has, and is served.
func (d *nbdDriver) adopt(dev *nbdDevice, place nbdPlace) error {
	if err := d.served.note(d.timeout, place.Backend); err != nil {
		return err
	}
	dev.nbdPlace = place
	close(dev.connected)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.devices[dev] = true
	return nil
}

// forget drops a device that is not served any more.
func (d *nbdDriver) forget(dev *nbdDevice) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.devices, dev)
}

func (d *nbdDriver) reattach(ctx context.Context, b Backend, o DeviceOptions) (Device, error) {
	backend := d.names.name(o.ID)
	places, err := findNBD()
	i := slices.IndexFunc(places, func(p nbdPlace) bool { return p.Backend == backend })
	if i < 0 {
		return nil, errors.Join(fmt.Errorf("no nbd device has the backend identifier %q: %w", backend, ErrDeviceGone), err)
	}
	dev := d.newDevice(b, o)
	dev.nbdPlace = places[i]
	size, err := sysfsSize(dev.name())
	if err != nil {
		return nil, err
	}
	if size > b.Size() {
		return nil, fmt.Errorf("%s has %d bytes, more than the backend's %d: %w", dev.path(), size, b.Size(), ErrDeviceGone)
	}
	dev.size.Store(size)
	left, err := d.served.left(backend)
	if err != nil {
		return nil, err
	}
	if left == 0 {
		return nil, fmt.Errorf("%s was not served for too long, requests may have failed: %w", dev.path(), ErrDeviceDead)
	}
	conn, err := dev.reconnect(ctx, left, time.Time{})
	if err != nil {
		return nil, err
	}
	dev.serve(context.WithoutCancel(ctx), conn)
	if err := d.adopt(dev, dev.nbdPlace); err != nil {
		dev.stop()
		return nil, err
	}
	return dev, nil
}

// run notes, over and over, which devices are served.
func (d *nbdDriver) run(ctx context.Context) {
	// Often enough that a process that is killed and started again has nearly the whole timeout.
	ticker := time.NewTicker(min(max(d.timeout/10, 100*time.Millisecond), 5*time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := d.noteServed(); err != nil {
			klog.FromContext(ctx).Error(err, "noting which devices are served")
		}
	}
}

func (d *nbdDriver) noteServed() error {
	d.mu.Lock()
	var backends []string
	for dev := range d.devices {
		if dev.live.Load() {
			backends = append(backends, dev.Backend)
		}
	}
	d.mu.Unlock()
	if len(backends) == 0 {
		return nil
	}
	return d.served.note(d.timeout, backends...)
}

// remove takes a device apart, see disconnectNBD. It goes on when ctx ends.
func (d *nbdDriver) remove(ctx context.Context, place nbdPlace, writeBack bool) (lost string, err error) {
	wait := detachWait
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	lost, err = nbdDisconnect(context.WithoutCancel(ctx), nbdRemoval{place, writeBack, wait})
	if err == nil {
		err = d.served.forget(place.Backend)
	}
	return lost, err
}

// abandon disconnects the device of an ended process, whoever has it open.
func (d *nbdDriver) abandon(id string) error {
	backend := d.names.name(id)
	places, err := findNBD()
	for _, place := range places {
		if place.Backend == backend {
			_, abandonErr := nbdAbandon(context.Background(), place)
			err = errors.Join(err, abandonErr)
		}
	}
	return err
}

// socketPair returns a connected pair: the client end for the kernel, the server end for us. A
// child inherits neither: a copy of the server end would keep the kernel from seeing our death.
func socketPair() (client *os.File, server net.Conn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	client = os.NewFile(uintptr(fds[0]), "nbd client end")
	end := os.NewFile(uintptr(fds[1]), "nbd server end")
	defer end.Close()
	server, err = net.FileConn(end) // a copy, in non-blocking mode; the kernel's end stays blocking
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	return client, server, nil
}

// hasEnded reports whether the other end of conn is closed. It reads nothing.
func hasEnded(conn net.Conn) (ended bool, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return false, err
	}
	var readErr error
	err = raw.Control(func(fd uintptr) {
		var n int
		n, _, readErr = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		ended = n == 0 && readErr == nil
	})
	if readErr == unix.EAGAIN {
		readErr = nil
	}
	return ended, errors.Join(err, readErr)
}

// kernelFlags are the transmission flags that the kernel knows, for a device with options o.
func kernelFlags(o DeviceOptions) TransmissionFlags {
	flags := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagCanMultiConn
	if o.ReadOnly {
		return flags | FlagReadOnly
	}
	flags |= FlagSendWriteZeroes // since Linux 6.12; ignored before
	if o.Discard {
		flags |= FlagSendTrim
	}
	return flags
}

// stale finds connected nbd devices with our identifiers that are not in live.
func (d *nbdDriver) stale(_ context.Context, live map[string]bool) ([]StaleDevice, error) {
	places, err := findNBD()
	var found []StaleDevice
	for _, place := range places {
		id, ours := d.names.id(place.Backend)
		if !ours || live[id] {
			continue
		}
		found = append(found, StaleDevice{ID: id, Kind: KindNBD, Path: place.path(), clean: func(ctx context.Context) error {
			_, err := d.remove(ctx, place, false) // nothing is written back, so nothing is lost
			return err
		}})
	}
	return found, err
}
