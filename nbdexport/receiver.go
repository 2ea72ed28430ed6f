package nbdexport

import (
	"io"
	"net"
	"time"
)

// receiveBuffer is the size of a connection's receive buffer: room for many
// small requests, small enough to stay in a CPU's cache.
const receiveBuffer = 64 << 10 // bytes

// A receiver reads requests, as many as there are with one system call.
type receiver struct {
	conn net.Conn
	buf  []byte
	r, w int // buf[r:w] is read from conn and not consumed
	// narrow: the last payload did not go through buf. The next probably will not
	// either, and what is read of it behind its head would be copied.
	narrow bool
	poll   *poller
	// requests counts those that were received since there was none; between says that
	// what is read begins with the head of the next.
	requests int
	between  bool
	// beforeRead is called before each read from conn, which may wait.
	beforeRead func()
	// afterRead is called after it.
	afterRead func()
}

// peek returns the next n bytes, at most receiveBuffer of them, without
// consuming them. They are valid until the next call. io.EOF means that the
// stream ended before the first of them.
func (rx *receiver) peek(n int) ([]byte, error) {
	for rx.w-rx.r < n {
		if rx.r > 0 && (rx.r == rx.w || len(rx.buf)-rx.r < n) {
			rx.w = copy(rx.buf, rx.buf[rx.r:rx.w])
			rx.r = 0
		}
		room := rx.buf[rx.w:]
		if rx.narrow {
			room, rx.narrow = room[:n-(rx.w-rx.r)], false
		}
		m, err := rx.read(room)
		rx.w += m
		if m == 0 && err != nil {
			if rx.w > rx.r {
				err = unexpectedEOF(err)
			}
			return nil, err
		}
	}
	return rx.buf[rx.r : rx.r+n], nil
}

// consume drops the next n bytes, which were peeked at.
func (rx *receiver) consume(n int) { rx.r += n }

// readFull fills p.
func (rx *receiver) readFull(p []byte) error {
	n := copy(p, rx.buf[rx.r:rx.w])
	rx.r += n
	rx.narrow = n < len(p)
	for n < len(p) {
		m, err := rx.read(p[n:])
		n += m
		if m == 0 && err != nil {
			return unexpectedEOF(err)
		}
	}
	return nil
}

// skip drops the next n bytes, however many.
func (rx *receiver) skip(n int) error {
	for n > 0 {
		k := min(n, len(rx.buf))
		if _, err := rx.peek(k); err != nil {
			return unexpectedEOF(err)
		}
		rx.consume(k)
		n -= k
	}
	return nil
}

// peekHead returns the next n bytes as peek does. They are the head of a request.
func (rx *receiver) peekHead(n int) ([]byte, error) {
	rx.between = true
	head, err := rx.peek(n)
	rx.between = false
	rx.requests++
	return head, err
}

func (rx *receiver) read(p []byte) (int, error) {
	rx.beforeRead()
	defer rx.afterRead()
	requests := rx.requests
	if rx.between {
		rx.requests = 0
	}
	if rx.poll.eager(requests) {
		if n, err := rx.poll.read(p); n > 0 || err != nil {
			return n, err
		}
	}
	begin := time.Now()
	n, err := rx.conn.Read(p)
	if rx.between {
		rx.poll.slept(time.Since(begin), requests)
	}
	return n, err
}

// unexpectedEOF returns err for a stream that must not end here.
func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
