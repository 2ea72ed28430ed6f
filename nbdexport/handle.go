package nbdexport

import (
	"context"
	"net"
	"syscall"
)

// sparseBytes is the shortest read for which asking for holes pays.
const sparseBytes = 64 << 10

// readInLine answers a read of at most inLineBytes.
func (c *conn) readInLine(r *request) error {
	buf := newBuffer(int(r.n))
	cost := requestCost + len(buf.b)
	if err := c.out.admit(cost); err != nil {
		buf.release()
		return err
	}
	c.readBuffer(r, buf, cost)
	return nil
}

// readBuffer reads all of r into buf, which it consumes, and replies.
func (c *conn) readBuffer(r *request, buf *buffer, cost int) {
	n := int(r.n)
	if err := c.readAt(buf.b[:n], r.off); err != nil {
		buf.release()
		c.replyError(r, err, "", cost)
		return
	}
	b, start := c.out.open()
	if c.terms.structured {
		b.head = c.terms.appendDataHeader(b.head, r, chunkDone, r.off, n)
	} else {
		b.head = appendSimpleReply(b.head, r.cookie, wireOK)
	}
	b.addHead(start)
	b.addPayload(buf, n)
	c.out.close(cost)
}

// readAt reads len(p) bytes; the backend knows no empty reads.
func (c *conn) readAt(p []byte, off uint64) error {
	if len(p) == 0 {
		return nil
	}
	_, err := c.backend.ReadAt(p, int64(off))
	return err
}

// writeInLine answers a write whose payload fits the receive buffer, from
// there.
func (c *conn) writeInLine(r *request) error {
	if err := c.out.admit(requestCost); err != nil {
		return err
	}
	p, err := c.rx.peek(int(r.n))
	if err != nil {
		c.out.refund(requestCost)
		return unexpectedEOF(err)
	}
	err = c.writeAt(p, r)
	c.rx.consume(len(p))
	c.reply(r, err, requestCost)
	return nil
}

// writeAt writes the whole payload of r.
func (c *conn) writeAt(p []byte, r *request) error {
	if len(p) == 0 {
		return nil
	}
	_, err := c.backend.WriteAt(p, int64(r.off))
	return err
}

// handWrite reads the payload of r into a buffer and hands both to a worker.
func (c *conn) handWrite(ctx context.Context, r *request) error {
	buf := newBuffer(int(r.n))
	cost := len(buf.b) + requestCost
	if err := c.out.admit(len(buf.b)); err != nil {
		buf.release()
		return err
	}
	if err := c.rx.readFull(buf.b[:r.n]); err != nil {
		buf.release()
		c.out.refund(len(buf.b))
		return err
	}
	return c.hand(ctx, task{r: *r, buf: buf, cost: cost})
}

// writeInPieces writes payload that is too long to be held at once, piece by
// piece as it arrives. After an error the rest is read and dropped.
func (c *conn) writeInPieces(r *request) error {
	cost := requestCost + maxBuffer
	if err := c.out.admit(cost); err != nil {
		return err
	}
	buf := newBuffer(maxBuffer)
	defer buf.release()
	var failed error
	for off, end := r.off, r.off+r.n; off < end; {
		n := pieceAt(off, end)
		if err := c.rx.readFull(buf.b[:n]); err != nil {
			c.out.refund(cost)
			return err
		}
		if failed == nil {
			_, failed = c.backend.WriteAt(buf.b[:n], int64(off))
		}
		off += uint64(n)
	}
	if failed == nil && r.flags&flagFUA != 0 {
		failed = c.backend.Flush()
	}
	c.reply(r, failed, cost)
	return nil
}

// pieceAt returns the length of the piece of [off, end) that starts at off:
// pieces end at multiples of maxBuffer.
func pieceAt(off, end uint64) int {
	return int(min(end-off, maxBuffer-off%maxBuffer))
}

// handle performs a task and replies. The request is valid: see validate.
func (c *conn) handle(ctx context.Context, t *task) {
	r := &t.r
	var err error
	switch r.cmd {
	case cmdRead:
		c.handleRead(ctx, t)
		return
	case cmdBlockStatus:
		c.handleBlockStatus(ctx, t)
		return
	case cmdWrite:
		err = c.writeAt(t.buf.b[:r.n], r)
		t.buf.release()
	case cmdFlush:
		err = c.backend.Flush()
	case cmdTrim:
		err = c.discard(r)
	case cmdWriteZeroes:
		err = c.writeZeroes(r)
	case cmdCache:
		if cacher, ok := c.backend.(Cacher); ok && r.n > 0 {
			err = cacher.Cache(int64(r.off), int64(r.n))
		}
	}
	if err == nil && r.flags&flagFUA != 0 && r.modifies() {
		err = c.backend.Flush()
	}
	c.reply(r, err, t.cost)
}

func (c *conn) discard(r *request) error {
	if r.n == 0 {
		return nil
	}
	return c.backend.Discard(int64(r.off), int64(r.n))
}

func (c *conn) writeZeroes(r *request) error {
	unmap := r.flags&flagNoHole == 0
	switch {
	case r.n == 0:
		return nil
	case r.flags&flagFastZero == 0:
		return c.backend.WriteZeroes(int64(r.off), int64(r.n), unmap)
	}
	if fast, ok := c.backend.(FastZeroer); ok {
		return fast.WriteZeroesFast(int64(r.off), int64(r.n), unmap)
	}
	return syscall.EOPNOTSUPP
}

// handleRead answers a read in a worker.
func (c *conn) handleRead(ctx context.Context, t *task) {
	r := &t.r
	switch {
	case r.flags&flagDF != 0 && r.n > maxBuffer:
		c.replyError(r, syscall.EOVERFLOW, "too long for a reply in one chunk", t.cost)
	case r.n > maxBuffer && !c.terms.structured:
		c.readStream(t)
	case r.n > maxBuffer || c.sparse && r.n >= sparseBytes && r.flags&flagDF == 0:
		c.readChunks(ctx, t)
	default:
		buf := newBuffer(int(r.n))
		if c.out.admit(len(buf.b)) != nil {
			buf.release()
			return
		}
		c.readBuffer(r, buf, t.cost+len(buf.b))
	}
}

// readChunks answers with several chunks: holes, and data in pieces.
func (c *conn) readChunks(ctx context.Context, t *task) {
	r := &t.r
	for off, end := r.off, r.off+r.n; off < end; {
		n := uint64(pieceAt(off, end))
		if c.sparse {
			e, err := c.backend.BlockStatus(ctx, int64(off), int64(end-off))
			if err != nil {
				c.replyError(r, err, "", t.cost)
				return
			}
			if e.Zero {
				off += uint64(e.Len)
				c.replyHole(r, off-uint64(e.Len), uint32(e.Len), off == end, t.cost)
				continue
			}
			n = min(n, uint64(e.Len))
		}
		buf := newBuffer(int(n))
		if c.out.admit(len(buf.b)) != nil {
			buf.release()
			return
		}
		if err := c.readAt(buf.b[:n], off); err != nil {
			c.out.refund(len(buf.b))
			buf.release()
			c.replyError(r, err, "", t.cost)
			return
		}
		b, start := c.out.open()
		cost, flags := len(buf.b), uint16(0)
		if off+n == end {
			cost, flags = cost+t.cost, chunkDone
		}
		b.head = c.terms.appendDataHeader(b.head, r, flags, off, int(n))
		b.addHead(start)
		b.addPayload(buf, int(n))
		c.out.close(cost)
		c.out.flush()
		off += n
	}
}

// replyHole adds a hole chunk; the last one of a reply returns its cost.
func (c *conn) replyHole(r *request, off uint64, n uint32, last bool, cost int) {
	flags := uint16(chunkDone)
	if !last {
		cost, flags = 0, 0
	}
	b, start := c.out.open()
	b.head = c.terms.appendHole(b.head, r, flags, off, n)
	b.addHead(start)
	c.out.close(cost)
}

// readStream answers a long read with a simple reply, whose data must follow
// at once. An error after the first piece can only be told by closing the
// connection.
func (c *conn) readStream(t *task) {
	r := &t.r
	end := r.off + r.n
	n := pieceAt(r.off, end)
	buf := newBuffer(maxBuffer)
	defer buf.release()
	if c.out.admit(maxBuffer) != nil {
		return
	}
	if err := c.readAt(buf.b[:n], r.off); err != nil {
		c.replyError(r, err, "", t.cost+maxBuffer)
		return
	}
	c.out.stream(func(send func(net.Buffers) error) error {
		if err := send(net.Buffers{appendSimpleReply(nil, r.cookie, wireOK), buf.b[:n]}); err != nil {
			return err
		}
		for off := r.off + uint64(n); off < end; off += uint64(n) {
			n = pieceAt(off, end)
			if err := c.readAt(buf.b[:n], off); err != nil {
				return err
			}
			if err := send(net.Buffers{buf.b[:n]}); err != nil {
				return err
			}
		}
		return nil
	})
	c.out.refund(t.cost + maxBuffer)
}

// reply ends r: with err, or with success and no data.
func (c *conn) reply(r *request, err error, cost int) {
	if err != nil {
		c.replyError(r, err, "", cost)
		return
	}
	b, start := c.out.open()
	b.head = c.terms.appendDone(b.head, r)
	b.addHead(start)
	c.out.close(cost)
}

// replyError ends r with err. An empty reason means err's text.
func (c *conn) replyError(r *request, err error, reason string, cost int) {
	if reason == "" {
		reason = err.Error()
	}
	b, start := c.out.open()
	b.head = c.terms.appendError(b.head, r, wireErrorOf(err), r.cmd.String()+": "+reason)
	b.addHead(start)
	c.out.close(cost)
}
