package nbdexport

import (
	"context"
	"time"
)

const (
	// writePiece is the length of the pieces in which a long write is made in line:
	// they are still in the CPU's cache when they are written, which costs the
	// server a quarter less than 1 MiB at a time, and no change of goroutines.
	writePiece = 256 << 10
	// slowPiece is the duration of a piece from which long writes are handed to
	// workers: the page cache takes some fifty microseconds.
	slowPiece = 250 * time.Microsecond
)

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

// writeLong makes a write that does not fit the receive buffer in line, in
// pieces of writePiece. Its pace counts the backend's time alone: the client's
// part of a long write is to send it.
func (c *conn) writeLong(r *request) error {
	took, err := c.writeInPieces(r, writePiece)
	pieces := (r.n + writePiece - 1) / writePiece
	c.longPace.took(took, slowPiece*time.Duration(pieces))
	return err
}

// writeInPieces writes payload piece by piece as it arrives, because it is too
// long to be held at once or better not held, and returns how long the backend took.
// After an error the rest is read and dropped.
func (c *conn) writeInPieces(r *request, piece uint64) (took time.Duration, err error) {
	cost := requestCost + bufferCost(int(min(piece, r.n)))
	if err := c.out.admit(cost); err != nil {
		return 0, err
	}
	buf := newBuffer(int(min(piece, r.n)))
	defer buf.release()
	var failed error
	for off, end := r.off, r.off+r.n; off < end; {
		n := pieceAt(off, end, piece)
		if err := c.rx.readFull(buf.b[:n]); err != nil {
			c.out.refund(cost)
			return took, err
		}
		if failed == nil {
			begin := time.Now()
			_, failed = c.backend.WriteAt(buf.b[:n], int64(off))
			took += time.Since(begin)
		}
		off += uint64(n)
	}
	if failed == nil && r.flags&flagFUA != 0 {
		failed = c.backend.Flush()
	}
	c.reply(r, failed, cost)
	return took, nil
}

// pieceAt returns the length of the piece of [off, end) that starts at off:
// pieces end at multiples of piece.
func pieceAt(off, end, piece uint64) int {
	return int(min(end-off, piece-off%piece))
}
