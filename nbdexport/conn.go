package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// connBudget bounds what one connection holds for requests under way and
	// for replies that its client has not read.
	connBudget = 16 << 20 // bytes
	// requestCost is what each request costs beside its payload: its place in
	// queues and the header of its reply.
	requestCost = 256 // bytes
	// inLineBytes is the longest request that may be answered in line. The
	// receive buffer holds its payload.
	inLineBytes = 32 << 10
	// drainTimeout bounds the wait for a client to take its last replies.
	drainTimeout = 5 * time.Second
	// maxWorkers bounds the goroutines of one connection that are in a backend.
	maxWorkers = 16
)

// ServeTransmission serves e on conn from the transmission phase on, without a
// handshake: for the kernel, which learns size and flags in another way (see
// Export.TransmissionFlags) and speaks only simple replies.
//
// It returns nil when the client has disconnected and every request that it
// sent is answered. When ctx ends, requests that were read are answered, and it
// returns ctx.Err(). conn is closed in every case. The backend is not flushed.
func ServeTransmission(ctx context.Context, conn net.Conn, e *Export) error {
	return newConn(conn, e.Backend, terms{flags: e.TransmissionFlags()}, 0).serve(ctx)
}

// A conn is the transmission phase of one connection.
//
//	                      +-> in line --------+
//	receiver -> validate -+-> tasks, workers -+-> sender
//	                      +-> pieces ---------+
//
// The goroutine in serve reads requests and answers the small ones in line, see
// pace. Long writes go to a pieceWriter as they arrive, the others to up to
// maxWorkers workers. Replies leave in any order.
type conn struct {
	backend Backend
	terms   terms
	aligned bool // see AlignedWriter
	sparse  bool // see SparseReader

	rx   receiver
	out  *sender
	pace pace
	// long makes writes longer than inLineBytes; nil when all go to workers.
	long *pieceWriter

	tasks   chan task
	workers sync.WaitGroup
	started int // workers; used by the reading goroutine only

	disconnected bool // the client has said that it goes; for when serve has returned
}

// A task is a validated request for a worker.
type task struct {
	r    request
	buf  *buffer // the payload of a WRITE; the task owns it
	cost int     // admitted
}

func newConn(nc net.Conn, b Backend, t terms, writeTimeout time.Duration) *conn {
	c := &conn{
		backend: b,
		terms:   t,
		out:     newSender(nc, connBudget, writeTimeout),
		tasks:   make(chan task),
	}
	if a, ok := b.(AlignedWriter); ok {
		c.aligned = a.WantsAligned()
	}
	if g, ok := b.(GranularWriter); !c.aligned && (!ok || g.WriteGranule() <= writePiece) {
		c.long = newPieceWriter(c)
	}
	if s, ok := b.(SparseReader); ok {
		c.sparse = t.structured && s.SparseReads()
	}
	widen(nc)
	c.rx = receiver{
		conn:       nc,
		poll:       newPoller(nc),
		buf:        alignedBytes(receiveBuffer),
		beforeRead: func() { c.pace.end(); c.out.flush() },
		afterRead:  c.pace.begin,
	}
	return c
}

// serve serves until the client disconnects, ctx ends or the protocol is
// broken. Then it answers what it has read and closes the connection.
func (c *conn) serve(ctx context.Context) error {
	ended := make(chan struct{})
	defer close(ended)
	stop := context.AfterFunc(ctx, func() { c.interrupt(ended) })
	defer stop()
	err := c.receiveAll(ctx)
	close(c.tasks)
	if c.long != nil {
		c.long.close()
	}
	c.workers.Wait()
	sendErr := c.out.wait()
	closeErr := c.rx.conn.Close()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case sendErr != nil:
		return fmt.Errorf("nbdexport: send: %w", sendErr)
	case err != nil:
		return err
	}
	return closeErr
}

// interrupt makes receiveAll stop, and closes the connection when the client
// does not take its last replies soon.
func (c *conn) interrupt(ended <-chan struct{}) {
	c.rx.conn.SetReadDeadline(time.Unix(1, 0)) // fails only when closed already
	select {
	case <-ended:
	case <-time.After(drainTimeout):
		c.rx.conn.Close()
	}
}

// receiveAll reads and starts requests until the stream ends.
func (c *conn) receiveAll(ctx context.Context) error {
	var r request // one for all: a new one for each would be allocated
	for {
		var err error
		r, err = c.receive()
		if err == io.EOF {
			return nil
		}
		if err == nil && r.cmd == cmdDisconnect {
			c.disconnected = true
			return nil
		}
		if err == nil {
			err = c.start(ctx, &r)
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("nbdexport: receive: %w", err)
		}
	}
}

// receive returns the next request. io.EOF means that there is none.
func (c *conn) receive() (request, error) {
	size, decode := requestSize, decodeRequest
	if c.terms.extended {
		size, decode = requestSizeExtended, decodeRequestExtended
	}
	head, err := c.rx.peekHead(size)
	if err != nil {
		return request{}, err
	}
	r, err := decode(head)
	c.rx.consume(size)
	return r, err
}

// start validates r and answers it, or hands it to a worker. An error means
// that no further request can be read.
func (c *conn) start(ctx context.Context, r *request) error {
	payload, err := r.payload(c.terms.extended)
	if err != nil {
		return err
	}
	if errno, reason := c.terms.validate(r, c.backend.Size()); errno != 0 {
		if err := c.rx.skip(payload); err != nil {
			return err
		}
		if err := c.out.admit(requestCost + len(reason)); err != nil {
			return err
		}
		c.replyError(r, errno, reason, requestCost+len(reason))
		return nil
	}
	switch {
	case r.cmd == cmdRead && r.n <= inLineBytes && c.pace.next():
		err = c.readInLine(r)
		c.pace.answered()
		return err
	case r.cmd == cmdWrite && r.n > inLineBytes && r.flags&flagFUA == 0 && c.long != nil && c.long.next():
		return c.long.write(r)
	case r.cmd == cmdWrite && r.n > maxBuffer:
		return c.writeHuge(r)
	case r.cmd == cmdWrite && r.n <= inLineBytes && r.flags&flagFUA == 0 && !c.aligned && c.pace.next():
		err = c.writeInLine(r)
		c.pace.answered()
		return err
	case r.cmd == cmdWrite:
		return c.handWrite(ctx, r)
	}
	return c.hand(ctx, task{r: *r, cost: requestCost})
}

// hand gives t to a worker, and waits for one if all are busy.
func (c *conn) hand(ctx context.Context, t task) error {
	if err := c.out.admit(requestCost); err != nil {
		return err
	}
	select {
	case c.tasks <- t: // to a worker that waits
		return nil
	default:
	}
	if c.started < maxWorkers {
		c.started++
		c.workers.Add(1)
		go c.work(ctx) // ends when tasks is closed
	}
	c.tasks <- t
	return nil
}

// work handles tasks until there will be no more.
func (c *conn) work(ctx context.Context) {
	defer c.workers.Done()
	var t task // one for all, as in receiveAll
	for t = range c.tasks {
		c.handle(ctx, &t)
		c.out.flush()
	}
}
