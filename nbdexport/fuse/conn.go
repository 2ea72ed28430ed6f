package fuse

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// BlockSize is what the file system calls its block size, in bytes: the loop driver takes it as
	// its granularity of discards.
	BlockSize = 4096

	// maxData bounds the data of one request, in bytes. The kernel splits what is larger; a
	// MiB in one piece was not faster, and its slots take four times the memory.
	maxData = 256 << 10

	// minReaders read a mount's requests, and up to maxReaders when the file is slow. Each has a slot.
	minReaders = 2
	maxReaders = 16

	// background bounds the requests without a waiter that the kernel has under way: a loop
	// device asks for up to 128 at once, and large ones are split.
	background = 512

	// slowRequest is from where on a request counts as slow: beyond what the page cache takes.
	slowRequest = 50 * time.Microsecond
)

// Options say how a mount appears.
type Options struct {
	Name     string // of the file, at most 255 bytes
	Size     int64  // of the file, in bytes
	ReadOnly bool   // no one may write
	Discard  bool   // holes may be punched
}

// A Conn serves the requests of one mount.
type Conn struct {
	file  File
	opts  Options
	size  atomic.Int64
	fd    int      // the device, as replies use it
	dev   *os.File // the device, as the runtime's poller has it
	slots *slots
	done  chan struct{} // closed when the last reader has ended

	// at is called at the points where a process may be killed; tests set it. See points.
	at func(point)

	waiting atomic.Int32 // readers without a request

	mu      sync.Mutex // leaf
	readers int        // that were started, and the slots they have; guarded by mu
	running int        // of them; guarded by mu
	err     error      // why the readers ended, the first; guarded by mu
	left    bool       // a request is, in a slot; guarded by mu
}

// A point is a place in the life of a request where the process may be killed.
type point string

// The points, in order. Between two of them nothing changes that another process can see.
const (
	atRead     point = "read"     // the request is in the slot
	atExecuted point = "executed" // the File has done it
	atFinished point = "finished" // it is noted as done
	atBuilt    point = "built"    // the answer is in the slot
	atReplied  point = "replied"  // the kernel has the answer
)

// newConn serves with sl what dev has. It owns both from here on. A slot with a request in
// it is seen to first.
func newConn(fd int, sl *slots, f File, o Options, at func(point)) (*Conn, error) {
	c := &Conn{
		file:  f,
		opts:  o,
		fd:    fd,
		dev:   os.NewFile(uintptr(fd), "/dev/fuse"), // non-blocking: a deadline ends the waiting
		slots: sl,
		done:  make(chan struct{}),
		at:    at,
	}
	c.size.Store(o.Size)
	n := min(minReaders, int(sl.count))
	for i := range int(sl.count) {
		if _, found := sl.peek(i).found(); found {
			n = max(n, i+1)
		}
	}
	sl.setEmpty(false)
	c.mu.Lock()
	defer c.mu.Unlock()
	ready := make([]*slot, n)
	for i := range ready {
		var err error
		if ready[i], err = sl.slot(i); err != nil {
			return nil, errors.Join(err, c.release())
		}
	}
	for _, s := range ready {
		c.startLocked(s)
	}
	return c, nil
}

// startLocked starts a reader. It ends when the mount does, or with Stop.
func (c *Conn) startLocked(s *slot) {
	c.readers++
	c.running++
	c.waiting.Add(1)
	go func() {
		r := &reader{Conn: c, slot: s}
		if err := r.run(); err != nil {
			c.fail(err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.left = c.left || r.left
		c.waiting.Add(-1)
		if c.running--; c.running == 0 {
			close(c.done)
		}
	}()
}

// grow starts one more reader, if there may be one.
func (c *Conn) grow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readers >= int(c.slots.count) || c.waiting.Load() > 0 {
		return
	}
	if s, err := c.slots.slot(c.readers); err == nil { // else there is no memory for it: those there are go on
		c.startLocked(s)
	}
}

// Descriptors returns the device and the slots: what another process needs to go
// on. They stay the Conn's.
func (c *Conn) Descriptors() (device, slots int) { return c.fd, int(c.slots.file.Fd()) }

// Size returns the size of the file in bytes.
func (c *Conn) Size() int64 { return c.size.Load() }

// SetSize changes what the kernel is told when it asks for the size.
func (c *Conn) SetSize(size int64) { c.size.Store(size) }

// Done is closed when no request is served any more: the mount is gone, or Stop was called.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Dead reports whether Done is closed.
func (c *Conn) Dead() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Close stops serving, after answering what has been read and not left, and lets go
// of the device and the slots. When the mount is there still and another process holds
// both, requests wait for the next Adopt.
func (c *Conn) Close() error {
	err := c.dev.SetReadDeadline(time.Unix(1, 0))
	if err != nil && !c.Dead() {
		return fmt.Errorf("fuse: stop: %w", err)
	}
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil && !c.left {
		c.slots.setEmpty(true)
	}
	return errors.Join(c.err, c.release())
}

// fail keeps err for Close.
func (c *Conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
	}
}

func (c *Conn) release() error { return errors.Join(c.dev.Close(), c.slots.close()) }
