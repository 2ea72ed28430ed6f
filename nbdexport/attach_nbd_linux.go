package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// nbdDeadConnTimeout is how long the kernel keeps requests while no process serves the device.
	// A restart of ours ends within it; after it the file system sees errors.
	nbdDeadConnTimeout = 600 * time.Second

	// nbdIOTimeout is how often the driver looks at a request that takes long. With one socket and
	// TIMEOUT 0 a look never fails or resends it, unless the socket was replaced since:
	// so this is the pause after a reconnect for what was in flight.
	nbdIOTimeout = time.Second
)

// nbdDriver makes devices of the kernel's nbd driver.
type nbdDriver struct {
	names deviceNames
}

func newNBDDriver(names deviceNames) *nbdDriver { return &nbdDriver{names: names} }

func (d *nbdDriver) usable() error {
	loadModule("nbd")
	n, err := dialNBD()
	if err != nil {
		return fmt.Errorf("%w: nbd: %w (it needs the kernel's nbd driver, and root)", ErrNoDeviceKind, err)
	}
	return n.close()
}

func (d *nbdDriver) attach(ctx context.Context, b Backend, o DeviceOptions) (_ Device, err error) {
	client, server, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer client.Close() // the kernel has its own reference; ours would hide the end of the connection
	dev := &nbdDevice{
		opts:    o,
		backend: b,
		id:      d.names.name(o.ID),
		export:  Export{Name: o.ID, Backend: b, ReadOnly: o.ReadOnly},
	}
	dev.size.Store(b.Size())

	// Serve before CONNECT: the kernel may read the device before it answers.
	dev.serve(context.WithoutCancel(ctx), server)
	n, err := dialNBD()
	if err != nil {
		dev.stop()
		return nil, err
	}
	defer n.close()
	dev.index, err = n.connect(nbdConfig{
		index:           nbdAnyIndex,
		size:            b.Size(),
		blockSize:       o.BlockSize,
		flags:           kernelFlags(o),
		deadConnTimeout: nbdDeadConnTimeout,
		backend:         dev.id,
		socket:          int(client.Fd()),
	})
	client.Close()
	if err != nil {
		dev.stop()
		return nil, err
	}
	if err := dev.ready(ctx, n); err != nil {
		// Its path was never handed out, so nobody has the device open but who looks at all devices.
		err = errors.Join(err, n.disconnect(dev.index))
		dev.stop()
		return nil, err
	}
	return dev, nil
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
	names, err := sysfsDevices("nbd")
	if err != nil {
		return nil, err
	}
	var found []StaleDevice
	var errs []error
	for _, name := range names {
		backend, err := sysfsValue(name, "backend")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			errs = append(errs, err)
			continue
		}
		id, ours := d.names.id(backend)
		if !ours || live[id] {
			continue
		}
		index, err := strconv.ParseUint(name[len("nbd"):], 10, 31)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		dev := &nbdDevice{id: backend, index: uint32(index)}
		found = append(found, StaleDevice{ID: id, Kind: KindNBD, Path: dev.Path(), clean: func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, detachWait)
			defer cancel()
			_, err := dev.disconnect(ctx, false) // nothing is written back, so nothing is lost
			return err
		}})
	}
	return found, errors.Join(errs...)
}
