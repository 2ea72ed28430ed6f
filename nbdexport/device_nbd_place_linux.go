package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/aside"
)

// An nbdPlace is an index of the nbd driver, and the backend identifier that it must have to be ours: an
// index is used again.
type nbdPlace struct {
	Index   uint32
	Backend string
}

func (p nbdPlace) name() string { return "nbd" + strconv.FormatUint(uint64(p.Index), 10) }
func (p nbdPlace) path() string { return "/dev/" + p.name() }

// ours returns nil when the index still belongs to the backend.
func (p nbdPlace) ours() error {
	backend, err := sysfsValue(p.name(), "backend")
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: no backend identifier (disconnected, or a kernel before 5.14): %w", p.path(), ErrDeviceGone)
	} else if err != nil {
		return err
	}
	if backend != p.Backend {
		return fmt.Errorf("%s: its backend is %q, not %q: %w", p.path(), backend, p.Backend, ErrDeviceGone)
	}
	return nil
}

// findNBD returns the place of every nbd device that has a backend identifier.
func findNBD() ([]nbdPlace, error) {
	names, err := sysfsDevices("nbd")
	if err != nil {
		return nil, err
	}
	var places []nbdPlace
	var errs []error
	for _, name := range names {
		backend, err := sysfsValue(name, "backend")
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		index, parseErr := strconv.ParseUint(name[len("nbd"):], 10, 31)
		if err := errors.Join(err, parseErr); err != nil {
			errs = append(errs, err)
			continue
		}
		places = append(places, nbdPlace{uint32(index), backend})
	}
	return places, errors.Join(errs...)
}

// setIOTimeout sets how often the driver looks at a request that takes long.
func (p nbdPlace) setIOTimeout(d time.Duration) error {
	return setSysfsValue(p.name(), "queue/io_timeout", strconv.FormatInt(d.Milliseconds(), 10))
}

// scan opens the device once. The first open after a connect or a change of size scans for a
// partition table, through us; those after it are free of I/O, so that a later process can look at
// the device while nobody serves it.
func (p nbdPlace) scan(ctx context.Context) error {
	f, err := openNode(ctx, p.path(), os.O_RDONLY)
	if err != nil {
		return err
	}
	return f.Close()
}

// What may wait for the device is done by a child: see package aside.
var (
	nbdConnect    = aside.Op("nbd connect", connectNBD, ErrDeviceGone, fs.ErrNotExist)
	nbdResize     = aside.Op("nbd resize", resizeNBD, ErrDeviceGone, fs.ErrNotExist)
	nbdAbandon    = aside.Op("nbd abandon", abandonNBD, ErrDeviceGone, fs.ErrNotExist)
	nbdDisconnect = aside.Op("nbd disconnect", disconnectNBD, ErrDeviceBusy, ErrDeviceGone, fs.ErrNotExist)
)

// connectNBD makes a device whose socket is files[0], and waits until it can be opened and is what c
// asks for.
func connectNBD(c nbdConfig, files []*os.File) (place nbdPlace, err error) {
	n, err := dialNBD()
	if err != nil {
		return nbdPlace{}, err
	}
	defer n.close()
	index, err := n.connect(c, int(files[0].Fd()))
	// The kernel has its own reference; ours would hide the end of the connection.
	if err := errors.Join(err, files[0].Close()); err != nil {
		return nbdPlace{}, err
	}
	place = nbdPlace{index, c.Backend}
	if err := place.ready(n, c.Size); err != nil {
		// Its path was never handed out, so nobody has the device open but who looks at all devices.
		return place, errors.Join(err, n.disconnect(index))
	}
	return place, nil
}

// ready waits until a new device can be opened, and checks that it is what we asked for.
func (p nbdPlace) ready(n *nbdNetlink, size int64) error {
	if err := p.setIOTimeout(nbdIOTimeout); err != nil {
		return err
	}
	if err := p.ours(); err != nil {
		return err
	}
	if ok, err := n.connected(p.Index); err != nil || !ok {
		return errors.Join(fmt.Errorf("%s: the driver says that it is not connected", p.path()), err)
	}
	if err := p.scan(context.Background()); err != nil {
		return err
	}
	got, err := sysfsSize(p.name())
	if err == nil && got != size {
		err = fmt.Errorf("%s has %d bytes, want %d", p.path(), got, size)
	}
	return err
}

// A nbdSize is a place with a size in bytes.
type nbdSize struct {
	nbdPlace
	Size int64
}

// resizeNBD tells the kernel the size of a device that is served.
func resizeNBD(s nbdSize, _ []*os.File) (struct{}, error) {
	n, err := dialNBD()
	if err != nil {
		return struct{}{}, err
	}
	defer n.close()
	if err := n.reconfigure(nbdReconfig{nbdPlace: s.nbdPlace, size: s.Size, socket: -1}); err != nil {
		return struct{}{}, err
	}
	if got, err := sysfsSize(s.name()); err != nil || got != s.Size {
		return struct{}{}, errors.Join(fmt.Errorf("%s has %d bytes after a resize to %d", s.path(), got, s.Size), err)
	}
	return struct{}{}, s.scan(context.Background())
}

// abandonNBD disconnects a device that nobody will serve again, whoever has it open: their requests fail.
func abandonNBD(p nbdPlace, _ []*os.File) (struct{}, error) {
	if err := p.ours(); err != nil {
		return struct{}{}, ignoring(err, ErrDeviceGone)
	}
	n, err := dialNBD()
	if err != nil {
		return struct{}{}, err
	}
	defer n.close()
	return struct{}{}, n.disconnect(p.Index)
}

// A nbdRemoval says how a device is taken apart.
type nbdRemoval struct {
	nbdPlace
	WriteBack bool          // what the kernel holds for it
	Wait      time.Duration // for openers
}

// disconnectNBD takes the device apart when nobody has it open, after writing back what the kernel
// holds for it when that is asked for. It waits for openers, and returns ErrDeviceBusy with the device as
// it was while there are any. A device that is not ours any more is success. lost, not "" when the write
// back failed, says why, which the kernel tells once: the device is disconnected all the same, unless
// err says otherwise.
func disconnectNBD(r nbdRemoval, _ []*os.File) (lost string, err error) {
	if err := r.ours(); err != nil {
		return "", ignoring(err, ErrDeviceGone)
	}
	ctx, cancel := context.WithTimeout(context.Background(), r.Wait)
	defer cancel()
	dev, err := r.claim(ctx)
	if err != nil {
		return "", err
	}
	defer dev.Close()
	// From here on nobody can mount the device.
	if err := r.ours(); err != nil {
		return "", ignoring(err, ErrDeviceGone)
	}
	if r.WriteBack {
		if err := dev.Sync(); err != nil {
			lost = fmt.Sprintf("write back %s: %v", r.path(), err)
		}
	}
	n, err := dialNBD()
	if err != nil {
		return lost, err
	}
	defer n.close()
	if err := n.disconnect(r.Index); err != nil {
		return lost, err
	}
	dev.Close() // the last reference to the connection is that of the open descriptor
	err = poll(ctx, func() (bool, error) {
		_, err := sysfsValue(r.name(), "pid")
		return errors.Is(err, fs.ErrNotExist), ignoring(err, fs.ErrNotExist)
	})
	if err != nil {
		return lost, fmt.Errorf("wait for the end of %s: %w", r.path(), err)
	}
	return lost, nil
}

// claim opens the device as its only opener.
func (p nbdPlace) claim(ctx context.Context) (*os.File, error) {
	var dev *os.File
	err := poll(ctx, func() (bool, error) {
		f, err := openExclusive(p.path())
		if errors.Is(err, unix.EBUSY) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		if busy, err := openedElsewhere(p.path()); busy || err != nil {
			return false, errors.Join(err, f.Close())
		}
		dev = f
		return true, nil
	})
	if err != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", p.path(), ErrDeviceBusy)
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
