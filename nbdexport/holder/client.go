package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of a Client.
var (
	// ErrNone reports that no holder answers, and that none could be started.
	ErrNone = errors.New("holder: no process holds descriptors")

	// ErrNotHeld reports that nothing is held under a name.
	ErrNotHeld = errors.New("holder: nothing is held under this name")
)

// A Client has descriptors held. It is made with NewClient and used from any
// number of goroutines; Close ends it.
type Client struct {
	path  string
	start func() error
	added chan struct{} // gets a value when something is held

	mu   sync.Mutex       // held over an exchange with the holder, at most exchangeTimeout
	conn *net.UnixConn    // nil while there is none; guarded by mu
	held map[string][]int // what the holder has, or shall have; guarded by mu
	err  error            // why something of held is not held; guarded by mu
}

// NewClient returns a Client for the holder of runDir. start, when it is not nil, starts one
// and returns when it answers; it is called when something is to be held and none answers.
func NewClient(runDir string, start func() error) *Client {
	return &Client{path: filepath.Join(runDir, socketName), start: start, added: make(chan struct{}, 1), held: make(map[string][]int)}
}

// Put has copies of fds held under name. They stay the caller's, and open until
// Drop or Leave. With an error nothing may be held; Run tries again.
func (c *Client) Put(name string, fds ...int) error {
	if err := checkPut(message{text: name, fds: fds}); err != nil {
		return fmt.Errorf("holder: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held[name] = fds
	select {
	case c.added <- struct{}{}:
	default:
	}
	return c.syncLocked(name)
}

// Leave leaves what is held under name to the next process.
func (c *Client) Leave(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.held, name)
}

// Drop ends the holding of name, which need not be held. Without a holder nothing is.
func (c *Client) Drop(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.held, name)
	_, err := c.askLocked(message{code: codeDrop, text: name})
	if errors.Is(err, ErrNone) {
		return nil
	}
	return err
}

// Get returns copies of what is held under name, the caller's. It returns
// ErrNotHeld when there is nothing, or no holder.
func (c *Client) Get(name string) ([]int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reply, err := c.askLocked(message{code: codeGet, text: name})
	switch {
	case errors.Is(err, ErrNone):
		return nil, fmt.Errorf("%w: %w", ErrNotHeld, err)
	case err != nil:
		return nil, err
	case reply.code == codeNotHeld:
		return nil, ErrNotHeld
	}
	return reply.fds, nil
}

// List returns the names under which something is held, none when there is no holder.
func (c *Client) List() ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reply, err := c.askLocked(message{code: codeList})
	if err != nil {
		if errors.Is(err, ErrNone) {
			err = nil
		}
		return nil, err
	}
	return strings.Fields(strings.ReplaceAll(reply.text, "\n", " ")), nil
}

// Err is nil while the holder has all that was put.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close ends the connection. What is held stays held.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hangUpLocked()
	return nil
}

const retryInterval = time.Second

// Run watches the holder, and puts everything again when there is a new one. It
// returns when ctx ends.
func (c *Client) Run(ctx context.Context) {
	select {
	case <-c.added:
	case <-ctx.Done():
		return
	}
	for ctx.Err() == nil {
		if err := c.watch(ctx); err == nil {
			continue
		}
		select {
		case <-time.After(retryInterval):
		case <-ctx.Done():
		}
	}
}

// watch waits for the end of a holder that has everything.
func (c *Client) watch(ctx context.Context) error {
	// The holder says nothing unasked: its end is all that is to be read.
	conn, err := dial(c.path)
	if err != nil {
		if syncErr := c.Sync(); syncErr != nil {
			return syncErr
		}
		if conn, err = dial(c.path); err != nil {
			return err
		}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := c.Sync(); err != nil {
		return err
	}
	var b [1]byte
	_, _ = conn.Read(b[:])
	c.mu.Lock()
	c.hangUpLocked()
	if ctx.Err() == nil && len(c.held) > 0 {
		c.err = fmt.Errorf("%w: the one that did has ended", ErrNone)
	}
	c.mu.Unlock()
	return c.Sync()
}

// Sync has everything held that was put.
func (c *Client) Sync() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.held) == 0 {
		c.err = nil
		return nil
	}
	for name := range c.held {
		if err := c.syncLocked(name); err != nil {
			return err
		}
	}
	c.err = nil
	return nil
}

// syncLocked has name held, by a new holder if need be.
func (c *Client) syncLocked(name string) error {
	put := message{code: codePut, text: name, fds: c.held[name]}
	_, err := c.askLocked(put)
	if errors.Is(err, ErrNone) && c.start != nil {
		if startErr := c.start(); startErr != nil {
			err = fmt.Errorf("%w: %w", err, startErr)
		} else {
			_, err = c.askLocked(put)
		}
	}
	if err != nil {
		c.err = err
	}
	return err
}

// askLocked sends a message and returns the reply, over a new connection if need be. A refusal is an error.
func (c *Client) askLocked(m message) (message, error) {
	fresh := c.conn == nil
	reply, err := c.exchangeLocked(m)
	if err != nil && !fresh { // the connection may have been to one that has ended
		reply, err = c.exchangeLocked(m)
	}
	if err == nil && reply.code == codeRefused {
		return reply, fmt.Errorf("holder: refused: %s", reply.text)
	}
	return reply, err
}

func (c *Client) exchangeLocked(m message) (reply message, err error) {
	if c.conn == nil {
		if c.conn, err = dial(c.path); err != nil {
			return message{}, err
		}
	}
	if err = c.conn.SetDeadline(time.Now().Add(exchangeTimeout)); err == nil {
		err = send(c.conn, m)
	}
	if err == nil {
		reply, err = receive(c.conn)
	}
	if err != nil {
		c.hangUpLocked()
		return message{}, fmt.Errorf("%w: %w", ErrNone, err)
	}
	return reply, nil
}

func (c *Client) hangUpLocked() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// dial connects to the holder at path.
func dial(path string) (*net.UnixConn, error) {
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("%w at %q", ErrNone, path)
		}
		return nil, fmt.Errorf("%w: %w", ErrNone, err)
	}
	if err := checkPeer(conn); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}
