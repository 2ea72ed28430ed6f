package nbdexport

import "errors"

// The replies of a connection. Each of these functions adds one reply, or one
// chunk of it, to what is pending; cost was admitted for it and returns when it
// is written.

// reply ends r: with err, or with success and no data, or, see ErrUnanswered, with nothing.
func (c *conn) reply(r *request, err error, cost int) {
	if errors.Is(err, ErrUnanswered) {
		c.out.refund(cost)
		return
	}
	if err != nil {
		c.replyError(r, err, "", cost)
		return
	}
	b, start := c.out.compose()
	b.head = c.terms.appendDone(b.head, r)
	b.addHead(start)
	c.out.commit(cost)
}

// replyError ends r with err. An empty reason means err's text.
func (c *conn) replyError(r *request, err error, reason string, cost int) {
	if reason == "" {
		reason = err.Error()
	}
	b, start := c.out.compose()
	b.head = c.terms.appendError(b.head, r, wireErrorOf(err), r.cmd.String()+": "+reason)
	b.addHead(start)
	c.out.commit(cost)
}

// replyData sends the first n bytes of buf, which were read from off, and ends
// r if they reach its end. buf belongs to the sender afterwards.
func (c *conn) replyData(r *request, off uint64, buf *buffer, n, cost int) {
	b, start := c.out.compose()
	if c.terms.structured {
		b.head = c.terms.appendDataHeader(b.head, r, r.doneAt(off+uint64(n)), off, n)
	} else {
		b.head = appendSimpleReply(b.head, r.cookie, wireOK)
	}
	b.addHead(start)
	b.addPayload(buf, n)
	c.out.commit(cost)
}

// replyHole says that the n bytes at off read as zeroes, for which requestCost
// was admitted, and ends r if they reach its end; only then does cost return.
func (c *conn) replyHole(r *request, off uint64, n uint32, cost int) {
	flags := r.doneAt(off + uint64(n))
	if flags == 0 {
		cost = 0
	}
	b, start := c.out.compose()
	b.head = c.terms.appendHole(b.head, r, flags, off, n)
	b.addHead(start)
	c.out.commit(cost + requestCost)
}

// doneAt returns the flags of a chunk that ends at off.
func (r *request) doneAt(off uint64) uint16 {
	if off == r.off+r.n {
		return chunkDone
	}
	return 0
}
