package nbdexport

import "context"

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
	cost := bufferCost(int(r.n))
	if err := c.out.admit(cost); err != nil {
		return err
	}
	buf := newBuffer(int(r.n))
	if err := c.rx.readFull(buf.b[:r.n]); err != nil {
		buf.release()
		c.out.refund(cost)
		return err
	}
	return c.hand(ctx, task{r: *r, buf: buf, cost: cost + requestCost})
}

// writeHuge makes a write that is too long to be held at once, in pieces of
// maxBuffer as it arrives. After an error the rest is read and dropped.
func (c *conn) writeHuge(r *request) error {
	cost := requestCost + bufferCost(maxBuffer)
	if err := c.out.admit(cost); err != nil {
		return err
	}
	buf := newBuffer(maxBuffer)
	defer buf.release()
	var failed error
	for off, end := r.off, r.off+r.n; off < end; {
		n := pieceAt(off, end, maxBuffer)
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
