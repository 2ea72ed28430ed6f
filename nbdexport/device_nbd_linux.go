package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// nbdDevice is a device of the kernel's nbd driver whose socket this process serves.
type nbdDevice struct {
	opts    DeviceOptions
	backend Backend
	export  Export
	index   uint32
	id      string // backend identifier
	size    atomic.Int64

	cancel context.CancelFunc // ends the serving
	done   chan struct{}      // closed when the connection has ended and no request is being served

	mu       sync.Mutex // held over kernel calls; Resize and Detach, one at a time
	detached bool       // guarded by mu
	lost     error      // write back that failed, as ErrNotFlushed, to be told at the end; guarded by mu
}

func (d *nbdDevice) name() string { return "nbd" + strconv.FormatUint(uint64(d.index), 10) }
func (d *nbdDevice) Path() string { return "/dev/" + d.name() }
func (d *nbdDevice) Kind() string { return KindNBD }
func (d *nbdDevice) Size() int64  { return d.size.Load() }

// serve serves conn until the kernel disconnects, or until stop.
func (d *nbdDevice) serve(ctx context.Context, conn net.Conn) {
	ctx, d.cancel = context.WithCancel(ctx)
	d.done = make(chan struct{})
	go func() { // ends when the kernel's end of the socket is closed, or with stop
		defer close(d.done)
		if err := ServeTransmission(ctx, conn, &d.export); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "nbd connection ended", "backend", d.id)
		}
	}()
}

// stop ends the serving and waits until no request is being served. The kernel has let go of
// the device, or never had it.
func (d *nbdDevice) stop() {
	d.cancel()
	<-d.done
}

// ready waits until the device can be opened, and checks that it is what we asked for.
func (d *nbdDevice) ready(ctx context.Context, n *nbdNetlink) error {
	if err := setSysfsValue(d.name(), "queue/io_timeout", strconv.FormatInt(nbdIOTimeout.Milliseconds(), 10)); err != nil {
		return err
	}
	if err := d.ours(); err != nil {
		return err
	}
	if ok, err := n.connected(d.index); err != nil || !ok {
		return errors.Join(fmt.Errorf("%s: the driver says that it is not connected", d.Path()), err)
	}
	if err := d.scan(ctx); err != nil {
		return err
	}
	size, err := sysfsSize(d.name())
	if err != nil {
		return err
	}
	if size != d.Size() {
		return fmt.Errorf("%s has %d bytes, want %d", d.Path(), size, d.Size())
	}
	return nil
}

// scan opens the device once. The first open after a connect or a change of size scans for a
// partition table, through us; those after it are free of I/O, so that a later process can look at
// the device while nobody serves it.
func (d *nbdDevice) scan(ctx context.Context) error {
	f, err := openNode(ctx, d.Path(), os.O_RDONLY)
	if err != nil {
		return err
	}
	return f.Close()
}

// ours returns nil when the index still belongs to this device: an index is used again.
func (d *nbdDevice) ours() error {
	backend, err := sysfsValue(d.name(), "backend")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: no backend identifier (disconnected, or a kernel before 5.14): %w", d.Path(), ErrDeviceGone)
	} else if err != nil {
		return err
	}
	if backend != d.id {
		return fmt.Errorf("%s: its backend is %q, not %q: %w", d.Path(), backend, d.id, ErrDeviceGone)
	}
	return nil
}

func (d *nbdDevice) Health() error {
	if err := d.ours(); err != nil {
		return err
	}
	select {
	case <-d.done:
		return fmt.Errorf("%s: %w", d.Path(), ErrDeviceDead)
	default:
		return nil
	}
}

func (d *nbdDevice) Resize(ctx context.Context, size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := checkResize(d, d.opts, d.backend, size)
	if err == nil {
		err = d.resize(ctx, size)
	}
	if err != nil {
		return fmt.Errorf("resize %q: %w", d.opts.ID, err)
	}
	return nil
}

func (d *nbdDevice) resize(ctx context.Context, size int64) error {
	n, err := dialNBD()
	if err != nil {
		return err
	}
	defer n.close()
	if err := n.reconfigure(nbdReconfig{index: d.index, backend: d.id, size: size, socket: -1}); err != nil {
		return err
	}
	if got, err := sysfsSize(d.name()); err != nil || got != size {
		return errors.Join(fmt.Errorf("%s has %d bytes after a resize to %d", d.Path(), got, size), err)
	}
	d.size.Store(size)
	return d.scan(ctx)
}

func (d *nbdDevice) Detach(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.detached {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, detachWait)
	defer cancel()
	dead := errors.Is(d.Health(), ErrDeviceDead)
	lost, err := d.disconnect(ctx, !dead)
	d.lost = errors.Join(d.lost, lost)
	if err != nil {
		return err
	}
	d.stop()
	d.detached = true
	if err := d.backend.Flush(); err != nil {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %w", ErrNotFlushed, err))
	}
	return d.lost
}

// disconnect takes the device apart when nobody has it open, after writing back what the kernel
// holds for it when writeBack is set. It waits for openers until ctx ends, then returns
// ErrDeviceBusy with the device as it was. A device that is not ours any more is success. lost is
// ErrNotFlushed when the write back failed, which the kernel tells once: the device is disconnected
// all the same, unless err says otherwise.
func (d *nbdDevice) disconnect(ctx context.Context, writeBack bool) (lost, err error) {
	if err := d.ours(); err != nil {
		return nil, ignoring(err, ErrDeviceGone)
	}
	dev, err := d.claim(ctx)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	// From here on nobody can mount the device.
	if err := d.ours(); err != nil {
		return nil, ignoring(err, ErrDeviceGone)
	}
	if writeBack {
		if err := dev.Sync(); err != nil {
			lost = fmt.Errorf("write back %s: %w: %w", d.Path(), ErrNotFlushed, err)
		}
	}
	n, err := dialNBD()
	if err != nil {
		return lost, err
	}
	defer n.close()
	if err := n.disconnect(d.index); err != nil {
		return lost, err
	}
	dev.Close() // the last reference to the connection is that of the open descriptor
	err = poll(ctx, func() (bool, error) {
		_, err := sysfsValue(d.name(), "pid")
		return errors.Is(err, fs.ErrNotExist), ignoring(err, fs.ErrNotExist)
	})
	if err != nil {
		return lost, fmt.Errorf("wait for the end of %s: %w", d.Path(), err)
	}
	return lost, nil
}

// claim opens the device as its only opener.
func (d *nbdDevice) claim(ctx context.Context) (*os.File, error) {
	var dev *os.File
	err := poll(ctx, func() (bool, error) {
		f, err := openExclusive(d.Path())
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		if busy, err := openedElsewhere(d.Path()); busy || err != nil {
			return false, errors.Join(err, f.Close())
		}
		dev = f
		return true, nil
	})
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", d.Path(), ErrDeviceBusy)
	}
	return dev, err
}

// ignoring is err without target.
func ignoring(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}
