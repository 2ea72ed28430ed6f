package nbdexport

import (
	"sync"
	"time"
)

const (
	// writePiece is the length of the pieces in which a long write is made: short
	// enough that the first is written while the rest arrives. Half and twice as
	// much are no faster.
	writePiece = 256 << 10
	// piecesAhead is how many pieces may wait to be written.
	piecesAhead = 4
	// slowPiece is the duration of a whole piece from which long writes are handed to
	// workers, less for shorter ones: the page cache takes some fifty microseconds.
	slowPiece = 250 * time.Microsecond
)

// A pieceWriter makes the long writes of a connection in pieces, in the order in
// which they arrive. It has a goroutine of its own, so that one piece is
// written while the next is received: all data is copied twice, and this is how
// two CPUs share that.
type pieceWriter struct {
	c       *conn
	pieces  chan piece // to the goroutine
	started bool       // used by the goroutine that reads the connection only

	mu   sync.Mutex
	pace pace // guarded by mu
}

// A piece is a part of the payload of a long write.
type piece struct {
	buf  *buffer // the piece owns it
	n    int     // bytes
	off  uint64  // in the export
	r    request // that it is a part of
	last bool    // the reply to r is due
}

func newPieceWriter(c *conn) *pieceWriter {
	return &pieceWriter{c: c, pieces: make(chan piece, piecesAhead)}
}

// next reports whether to write the next long write in pieces.
func (w *pieceWriter) next() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pace.next()
}

// write receives the payload of r and has it written. The reply follows by itself.
func (w *pieceWriter) write(r *request) error {
	out := w.c.out
	if !w.started {
		w.started = true
		w.c.workers.Go(w.work) // ends when close is called
	}
	if err := out.admit(requestCost); err != nil {
		return err
	}
	for off, end := r.off, r.off+r.n; off < end; {
		p := piece{n: pieceAt(off, end, writePiece), off: off, r: *r}
		if err := out.admit(bufferCost(p.n)); err != nil {
			return err
		}
		p.buf = newBuffer(p.n)
		if err := w.c.rx.readFull(p.buf.b[:p.n]); err != nil {
			p.buf.release()
			out.refund(bufferCost(p.n))
			return err
		}
		off += uint64(p.n)
		p.last = off == end
		w.pieces <- p
	}
	return nil
}

// close lets the goroutine end when it has written what it was given.
func (w *pieceWriter) close() { close(w.pieces) }

// work writes pieces until there will be no more. After an error it drops the
// rest of a request.
func (w *pieceWriter) work() {
	var (
		failed error         // of the request
		took   time.Duration // of its pieces
		p      piece         // one for all: its request would be allocated
	)
	for p = range w.pieces {
		if failed == nil {
			begin := time.Now()
			_, failed = w.c.backend.WriteAt(p.buf.b[:p.n], int64(p.off))
			took += time.Since(begin)
		}
		p.buf.release()
		w.c.out.refund(bufferCost(p.n))
		if p.last {
			w.took(took, p.r.n)
			w.c.reply(&p.r, failed, requestCost)
			w.c.out.flush()
			failed, took = nil, 0
		}
	}
}

// took tells the pace how long the backend took for a request of n bytes. It counts
// nothing else: the client's part of a long write is to send it.
func (w *pieceWriter) took(d time.Duration, n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pace.took(d, max(slowRequest, slowPiece*time.Duration(n)/writePiece))
}

// pieceAt returns the length of the piece of [off, end) that starts at off:
// pieces end at multiples of piece.
func pieceAt(off, end, piece uint64) int {
	return int(min(end-off, piece-off%piece))
}
