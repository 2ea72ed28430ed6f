package nbdexport

import (
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

// batchCost is the cost from which a batch is not let grow: half of a socket's
// usual send buffer.
const batchCost = 128 << 10 // bytes

// A batch is a run of encoded replies that are written with one system call.
type batch struct {
	head  []byte      // headers and other small parts, one after another
	parts net.Buffers // what to write, in order: ranges of head, and payload
	run   int         // where the last part starts in head, or -1 when it is payload
	held  []*buffer   // memory of payload, released when it is written
	cost  int         // of the replies in it, see sender.admit
}

// newBatch returns an empty batch.
func newBatch() *batch { return &batch{run: -1} }

// addHead takes over what was appended to b.head since it was start bytes long.
func (b *batch) addHead(start int) {
	if b.run >= 0 {
		b.parts[len(b.parts)-1] = b.head[b.run:]
		return
	}
	b.run = start
	b.parts = append(b.parts, b.head[start:])
}

// addPayload adds the first n bytes of buf, and owns buf from now on.
func (b *batch) addPayload(buf *buffer, n int) {
	b.parts = append(b.parts, buf.b[:n])
	b.held = append(b.held, buf)
	b.run = -1
}

// reset releases what b holds and makes it empty. Its memory stays, unless it
// has grown beyond what a batch usually needs.
func (b *batch) reset() {
	for i, buf := range b.held {
		buf.release()
		b.held[i] = nil
	}
	if cap(b.head) > 64<<10 {
		b.head = nil
	}
	clear(b.parts)
	b.head, b.parts, b.held, b.run, b.cost = b.head[:0], b.parts[:0], b.held[:0], -1, 0
}

// A sender writes the replies of one connection. Replies that become ready
// while others are being written wait in pending and leave together.
//
// It also bounds what the connection may hold: each request is admitted at a
// cost in bytes, which it returns when its reply is written. A client that does
// not read its replies soon gets no more requests accepted, and after timeout
// without progress its connection is closed.
type sender struct {
	conn    net.Conn
	timeout time.Duration // without progress; 0 means none

	mu      sync.Mutex
	changed sync.Cond // free, sending or err has changed; on mu
	pending *batch    // guarded by mu
	sending bool      // one goroutine writes, the one that set it; guarded by mu
	free    int       // bytes that may still be admitted; guarded by mu
	err     error     // first failure; nothing is written after it; guarded by mu

	// Used by the goroutine that has set sending.
	writing  *batch
	parts    net.Buffers // what is left of writing.parts
	deadline time.Time   // the connection's write deadline
}

func newSender(conn net.Conn, budget int, timeout time.Duration) *sender {
	s := &sender{conn: conn, timeout: timeout, free: budget, pending: newBatch(), writing: newBatch()}
	s.changed.L = &s.mu
	return s
}

// admit waits until cost more bytes may be held, and returns the error of the
// connection if it has failed. Whoever calls it writes out what is pending
// first if there is not enough: the bytes may be held there.
func (s *sender) admit(cost int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.free < cost && s.err == nil {
		if !s.sending && len(s.pending.parts) > 0 {
			s.drainLocked()
			continue
		}
		s.changed.Wait()
	}
	s.free -= cost
	return s.err
}

// refund returns cost bytes of a request that will have no reply.
func (s *sender) refund(cost int) {
	s.mu.Lock()
	s.free += cost
	s.mu.Unlock()
	s.changed.Broadcast()
}

// compose returns the pending batch for one more reply or chunk, and the place
// in its head where that starts. commit must follow.
func (s *sender) compose() (b *batch, start int) {
	s.mu.Lock()
	return s.pending, len(s.pending.head)
}

// commit ends what compose began. cost is returned when the batch is written.
// A batch that has become long is written at once: the client may as well
// begin with it, and it is still in the CPU's cache.
func (s *sender) commit(cost int) {
	s.pending.cost += cost
	if s.pending.cost >= batchCost && !s.sending {
		s.drainLocked()
	}
	s.mu.Unlock()
}

// flush writes what is pending, unless another goroutine is writing: that one
// goes on until nothing is pending.
func (s *sender) flush() {
	s.mu.Lock()
	if !s.sending && len(s.pending.parts) > 0 {
		s.drainLocked()
	}
	s.mu.Unlock()
}

// drainLocked drops and retakes s.mu. It writes batches until none is pending.
func (s *sender) drainLocked() {
	s.sending = true
	for len(s.pending.parts) > 0 {
		s.pending, s.writing = s.writing, s.pending
		failed := s.err != nil
		s.mu.Unlock()
		var err error
		if !failed {
			s.parts = s.writing.parts
			err = s.write(&s.parts)
		}
		cost := s.writing.cost
		s.writing.reset()
		s.mu.Lock()
		s.free += cost
		s.failLocked(err)
		s.changed.Broadcast()
	}
	s.sending = false
	s.changed.Broadcast()
}

// stream lets write have the connection for itself, for replies whose parts
// must follow each other but are too large to be held at once.
func (s *sender) stream(write func(send func(net.Buffers) error) error) {
	s.mu.Lock()
	for s.sending {
		s.changed.Wait()
	}
	s.sending = true
	err := s.err
	s.mu.Unlock()
	if err == nil {
		err = write(func(parts net.Buffers) error { return s.write(&parts) })
	}
	s.mu.Lock()
	s.failLocked(err)
	s.drainLocked()
	s.mu.Unlock()
}

// write writes parts and consumes them, for as long as the client goes on reading.
// Only the goroutine that has set s.sending may call it.
func (s *sender) write(parts *net.Buffers) error {
	for {
		if err := s.extend(); err != nil {
			return err
		}
		n, err := s.writeSome(parts)
		if n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		s.deadline = time.Time{} // it has read something
	}
}

// extend sets the write deadline once in a while: it then leaves between three
// quarters of the timeout and all of it.
func (s *sender) extend() error {
	if s.timeout == 0 {
		return nil
	}
	now := time.Now()
	if s.deadline.Sub(now) >= s.timeout*3/4 {
		return nil
	}
	s.deadline = now.Add(s.timeout)
	return s.conn.SetWriteDeadline(s.deadline)
}

// writeSome writes parts with one call, and consumes what it has written.
func (s *sender) writeSome(parts *net.Buffers) (int64, error) {
	if len(*parts) > 1 {
		return parts.WriteTo(s.conn)
	}
	n, err := s.conn.Write((*parts)[0])
	(*parts)[0] = (*parts)[0][n:]
	return int64(n), err
}

// failLocked makes err, if not nil, the end of the connection: it wakes the
// goroutine that reads requests.
func (s *sender) failLocked(err error) {
	if err == nil || s.err != nil {
		return
	}
	s.err = err
	s.conn.Close() // the failure that counts is err
	s.changed.Broadcast()
}

// wait returns when nothing is pending and nobody writes, with the error of
// the connection.
func (s *sender) wait() error {
	s.flush()
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.sending {
		s.changed.Wait()
	}
	return s.err
}
