package fuse

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A reader answers one request after the other.
type reader struct {
	*Conn
	*slot
	left bool // the request in the slot is for the next process
}

// run answers requests until the mount is gone, the deadline of Close, or one that is left.
func (r *reader) run() error {
	if h, ok := r.found(); ok { // a predecessor's
		r.reach(atRead)
		r.serve(h)
	}
	r.touch(len(r.data())) // a new slot has no canaries
	for !r.left {
		r.arm()
		n, err := r.dev.Read(r.request())
		switch {
		case errors.Is(err, unix.ENOENT):
			continue // the request was withdrawn
		case errors.Is(err, os.ErrDeadlineExceeded), err != nil && disconnected(r.fd):
			return nil
		case err != nil:
			return fmt.Errorf("fuse: %w", err)
		}
		h, ok := r.found()
		if !ok || int(h.len) != n {
			return fmt.Errorf("fuse: a request of %d bytes says that it has %d", n, h.len)
		}
		r.reach(atRead)
		if r.waiting.Add(-1) > 0 {
			r.serve(h)
		} else {
			begin := time.Now()
			r.serve(h)
			if time.Since(begin) > slowRequest {
				r.grow()
			}
		}
		r.waiting.Add(1)
	}
	return nil
}

// disconnected reports whether the mount of the device fd is gone.
func disconnected(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0 && fds[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
}

// reach tells a test where the reader is.
func (r *reader) reach(p point) {
	if r.at != nil {
		r.at(p)
	}
}

// answer sends b, an answer with its header. The kernel does not know a request that was withdrawn,
// or that a predecessor has answered.
func (r *reader) answer(b []byte) {
	r.reach(atBuilt)
	_, err := unix.Write(r.fd, b)
	if err != nil && !errors.Is(err, unix.ENOENT) && !disconnected(r.fd) {
		r.fail(fmt.Errorf("fuse: answer of %d bytes: %w", len(b), err))
	}
	r.reach(atReplied)
}

// reply answers the request unique: with an error number, or with size bytes that stand behind
// the header at slotReply.
func (r *reader) reply(unique uint64, errno uint32, size int) {
	if errno != 0 {
		size = 0
	}
	b := r.mem[slotReply:][:outHeaderSize+size]
	encodeOutHeader(b, unique, errno, size)
	r.answer(b)
}

// replyBody is where reply expects what follows the header.
func (r *reader) replyBody() []byte { return r.mem[slotReply+outHeaderSize : slotReply+replySize] }

// replyData answers a READ with the first n bytes of data.
func (r *reader) replyData(unique uint64, n int) {
	b := r.mem[slotData-outHeaderSize:][:outHeaderSize+n]
	encodeOutHeader(b, unique, 0, n)
	r.answer(b)
}
