package nbdexport

import (
	"context"
	"net"
	"syscall"
)

const (
	// sparseBytes is the shortest read for which asking for holes pays.
	sparseBytes = 64 << 10
	// readPiece is the length of the chunks in which a long read is answered:
	// they are still in the CPU's cache when they are sent, which costs the
	// server 15 % less than 1 MiB at a time.
	readPiece = 256 << 10
)

// readInLine answers a read of at most inLineBytes.
func (c *conn) readInLine(r *request) error {
	cost := requestCost + bufferCost(int(r.n))
	if err := c.out.admit(cost); err != nil {
		return err
	}
	c.readWhole(r, cost)
	return nil
}

// readWhole answers a read with one piece of data. cost covers its buffer. An
// empty read is answered without data: there are no empty chunks of it.
func (c *conn) readWhole(r *request, cost int) {
	if r.n == 0 {
		c.reply(r, nil, cost)
		return
	}
	buf := newBuffer(int(r.n))
	if err := c.readAt(buf.b[:r.n], r.off); err != nil {
		buf.release()
		c.replyError(r, err, "", cost)
		return
	}
	c.replyData(r, r.off, buf, int(r.n), cost)
}

// readAt reads len(p) bytes, more than none.
func (c *conn) readAt(p []byte, off uint64) error {
	_, err := c.backend.ReadAt(p, int64(off))
	return err
}

// handleRead answers a read in a worker.
func (c *conn) handleRead(ctx context.Context, t *task) {
	r := &t.r
	switch {
	case r.flags&flagDF != 0 && r.n > maxBuffer:
		c.replyError(r, syscall.EOVERFLOW, "too long for a reply in one chunk", t.cost)
	case c.terms.structured && r.flags&flagDF == 0 && (r.n > readPiece || c.sparse && r.n >= sparseBytes):
		c.readChunks(ctx, t)
	case r.n > maxBuffer:
		c.readStream(t)
	default:
		cost := bufferCost(int(r.n))
		if c.out.admit(cost) != nil {
			return
		}
		c.readWhole(r, t.cost+cost)
	}
}

// readChunks answers with several chunks: holes, and data in pieces.
func (c *conn) readChunks(ctx context.Context, t *task) {
	r := &t.r
	for off, end := r.off, r.off+r.n; off < end; {
		n := min(end-off, readPiece-off%readPiece)
		if c.sparse {
			e, err := c.blockStatus(ctx, off, end-off)
			if err != nil {
				c.replyError(r, err, "", t.cost)
				return
			}
			if e.Zero {
				if c.out.admit(requestCost) != nil { // a backend may tell thousands of them
					return
				}
				c.replyHole(r, off, uint32(e.Len), t.cost)
				off += uint64(e.Len)
				continue
			}
			n = min(n, uint64(e.Len))
		}
		if !c.readChunk(r, off, int(n), t.cost) {
			return
		}
		off += n
	}
}

// readChunk answers a part of a read, and returns false when that has ended
// the request. cost returns with the last part.
func (c *conn) readChunk(r *request, off uint64, n, cost int) bool {
	pieceCost := bufferCost(n)
	if c.out.admit(pieceCost) != nil {
		return false
	}
	buf := newBuffer(n)
	if err := c.readAt(buf.b[:n], off); err != nil {
		buf.release()
		c.replyError(r, err, "", cost+pieceCost)
		return false
	}
	if off+uint64(n) < r.off+r.n {
		cost = 0
	}
	c.replyData(r, off, buf, n, cost+pieceCost)
	c.out.flush()
	return true
}

// readStream answers a long read with a simple reply, whose data must follow
// at once. An error after the first piece can only be told by closing the
// connection.
func (c *conn) readStream(t *task) {
	r := &t.r
	end := r.off + r.n
	n := pieceAt(r.off, end, maxBuffer)
	if c.out.admit(maxBuffer) != nil {
		return
	}
	buf := newBuffer(maxBuffer)
	defer buf.release()
	if err := c.readAt(buf.b[:n], r.off); err != nil {
		c.replyError(r, err, "", t.cost+maxBuffer)
		return
	}
	c.out.stream(func(send func(net.Buffers) error) error {
		if err := send(net.Buffers{appendSimpleReply(nil, r.cookie, wireOK), buf.b[:n]}); err != nil {
			return err
		}
		for off := r.off + uint64(n); off < end; off += uint64(n) {
			n = pieceAt(off, end, maxBuffer)
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
