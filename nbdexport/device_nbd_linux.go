package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// nbdDevice is a device of the kernel's nbd driver whose socket this process serves.
type nbdDevice struct {
	driver  *nbdDriver
	opts    DeviceOptions
	backend Backend
	export  Export
	size    atomic.Int64

	nbdPlace                // set once, before connected is closed
	connected chan struct{} // closed when the kernel has the device

	live   atomic.Bool        // a connection is being served
	cancel context.CancelFunc // ends the serving
	done   chan struct{}      // closed when the serving has ended for good and no request is under way

	mu       sync.Mutex // held over kernel calls; Resize and Detach, one at a time
	detached bool       // guarded by mu
	lost     error      // write back that failed, as ErrNotFlushed, to be told at the end; guarded by mu
}

func (d *nbdDevice) Path() string { return d.path() }
func (d *nbdDevice) Kind() string { return KindNBD }
func (d *nbdDevice) Size() int64  { return d.size.Load() }

// serve serves conn, and the connections that take its place, until the kernel disconnects, the
// device is not ours any more, or stop.
func (d *nbdDevice) serve(ctx context.Context, conn net.Conn) {
	ctx, d.cancel = context.WithCancel(ctx)
	d.done = make(chan struct{})
	d.live.Store(true)
	go func() { // ends when the kernel has let go of the device, or with stop
		defer close(d.done)
		defer d.live.Store(false)
		log := klog.FromContext(ctx).WithValues("backend", d.export.Name)
		for {
			begin := time.Now()
			c := newConn(conn, d.backend, terms{flags: d.export.TransmissionFlags()}, 0)
			err := c.serve(ctx) // no request is under way when it returns: none can change what a resent one wrote
			d.live.Store(false)
			if ctx.Err() != nil || c.disconnected {
				return
			}
			select {
			case <-d.connected:
			case <-ctx.Done():
				return
			}
			log.Error(err, "nbd connection lost", "device", d.path())
			if conn, err = d.reconnect(ctx, d.driver.timeout, begin); err != nil {
				log.Error(err, "nbd device is given up", "device", d.path())
				return
			}
			log.Info("nbd device has a new connection", "device", d.path())
			d.live.Store(true)
		}
	}()
}

// stop ends the serving and waits until no request is under way. The kernel keeps the device, if
// it has it, and what was not answered.
func (d *nbdDevice) stop() {
	d.cancel()
	<-d.done
}

// Survives is nil: the kernel keeps an nbd device.
func (d *nbdDevice) Survives() error { return nil }

func (d *nbdDevice) Leave() {
	d.hasten()
	d.stop()
	d.driver.forget(d)
}

const (
	// leaveIOTimeout is how soon the kernel looks at what a process has left unanswered, beside the second that it
	// adds. The next process sets it back: with it, the kernel logs whatever is under way at a look.
	leaveIOTimeout = time.Millisecond
	// leaveGrace is how long a process goes on after it has set that: what the kernel has sent before is
	// answered by then, most likely.
	leaveGrace = 20 * time.Millisecond
)

// hasten has the kernel resend soon, after a reconnect, what it sends from now on and nobody reads.
func (d *nbdDevice) hasten() {
	if d.ours() != nil || d.setIOTimeout(leaveIOTimeout) != nil {
		return // then it takes a second longer
	}
	select {
	case <-d.done:
	case <-time.After(leaveGrace):
	}
}

// reconnectPause is how long a connection lives at least that is replaced without a pause.
const reconnectPause = time.Second

// reconnect gives the kernel a new socket for one that it has lost, and returns our end. last is when
// that connection began. It goes on until the kernel has taken one, for at most wait: after that the
// kernel may have failed requests.
func (d *nbdDevice) reconnect(ctx context.Context, wait time.Duration, last time.Time) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("%s: no server for too long: %w", d.path(), ErrDeviceDead))
	defer cancel()
	if time.Since(last) < reconnectPause { // one that the kernel drops again and again
		select {
		case <-time.After(reconnectPause):
		case <-ctx.Done():
		}
	}
	var conn net.Conn
	var refused error
	err := poll(ctx, func() (bool, error) {
		if err := d.ours(); err != nil {
			return false, err
		}
		var taken bool
		conn, taken, refused = d.offer()
		return taken, nil
	})
	if err == nil && ctx.Err() != nil {
		err = conn.Close() // too late
	}
	if ctx.Err() != nil {
		return nil, errors.Join(context.Cause(ctx), err, refused)
	}
	if err != nil {
		return nil, err
	}
	if err := d.setIOTimeout(nbdIOTimeout); err != nil {
		klog.FromContext(ctx).Error(err, "set the timeout of requests", "device", d.path())
	}
	return conn, nil
}

// offer gives the kernel one new socket. The kernel takes it only for a socket that it has marked dead; when
// it has marked none it drops the new one and calls that success. What proves that it was taken is
// that the kernel holds it: ours is closed then, and the server's end has not ended.
func (d *nbdDevice) offer() (conn net.Conn, taken bool, err error) {
	client, server, err := socketPair()
	if err != nil {
		return nil, false, err
	}
	defer func() {
		if !taken {
			server.Close()
		}
	}()
	n, err := dialNBD()
	if err != nil {
		client.Close()
		return nil, false, err
	}
	defer n.close()
	err = n.reconfigure(nbdReconfig{nbdPlace: d.nbdPlace, socket: int(client.Fd()), deadConnTimeout: d.driver.timeout})
	if err := errors.Join(err, client.Close()); err != nil {
		return nil, false, err
	}
	ended, err := hasEnded(server)
	return server, err == nil && !ended, err
}

func (d *nbdDevice) Health() error {
	if err := d.ours(); err != nil {
		return err
	}
	select {
	case <-d.done:
		return fmt.Errorf("%s: %w", d.path(), ErrDeviceDead)
	default:
	}
	if !d.live.Load() {
		return fmt.Errorf("%s: %w", d.path(), ErrDeviceReconnecting)
	}
	return nil
}

func (d *nbdDevice) Resize(ctx context.Context, size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := checkResize(d, d.opts, d.backend, size)
	if err == nil {
		_, err = nbdResize(ctx, nbdSize{d.nbdPlace, size})
	}
	if err != nil {
		return fmt.Errorf("resize %q: %w", d.opts.ID, err)
	}
	d.size.Store(size)
	return nil
}

func (d *nbdDevice) Detach(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.detached {
		return nil
	}
	dead := errors.Is(d.Health(), ErrDeviceDead)
	lost, err := d.driver.remove(ctx, d.nbdPlace, !dead)
	if lost != "" {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %s", ErrNotFlushed, lost))
	}
	if err != nil {
		return err
	}
	d.stop()
	d.driver.forget(d)
	d.detached = true
	if err := d.backend.Flush(); err != nil {
		d.lost = errors.Join(d.lost, fmt.Errorf("%w: %w", ErrNotFlushed, err))
	}
	return d.lost
}
