package fuse

import (
	"sync/atomic"
	"unsafe"
)

const pageSize = 4096

// A slot is the memory for one request and its answer. What the kernel writes
// begins so that the data of a WRITE is aligned; the data of a READ goes to the
// same place, with the header of its answer before it.
//
//	Offset  Size  Field        Meaning
//	     0     8  done         number of the request that was executed and must not be again
//	     8     4  done errno   of its answer
//	    64  1024  reply        an answer without data, with its header
//	  4016    40  inHeader     the request; its len is 0 before the first
//	  4056    40  arguments
//	  4080    16               overwritten by the header of the answer to a READ
//	  4096  size  data         each page of it starts with the canary until the kernel writes there
type slot struct {
	mem    []byte
	canary uint64
	used   int // bytes of data that may have overwritten canaries since they were set
}

const (
	slotReply   = 64
	slotRequest = pageSize - inHeaderSize - ioInSize
	slotArgs    = slotRequest + inHeaderSize
	slotData    = pageSize

	replySize = 1024 // bytes at slotReply
)

// request is the memory that the kernel reads a request into.
func (s *slot) request() []byte { return s.mem[slotRequest:] }

// data is the memory for data.
func (s *slot) data() []byte { return s.mem[slotData:] }

// body returns what follows the header of a request of n bytes.
func (s *slot) body(n uint32) []byte { return s.mem[slotArgs : slotRequest+int(n)] }

// The field done is written last and read first: a process may be killed between any two stores.
func (s *slot) doneField() *atomic.Uint64 { return (*atomic.Uint64)(unsafe.Pointer(&s.mem[0])) }

// finish notes that the request unique was executed with result errno.
func (s *slot) finish(unique uint64, errno uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&s.mem[8])), errno)
	s.doneField().Store(unique)
}

// finished reports whether the request unique was executed, and with what result.
func (s *slot) finished(unique uint64) (errno uint32, ok bool) {
	if unique == 0 || s.doneField().Load() != unique {
		return 0, false
	}
	return wire.Uint32(s.mem[8:]), true
}

// arm puts the canaries back before the next request.
func (s *slot) arm() {
	data := s.data()
	for off := 0; off < s.used; off += pageSize {
		wire.PutUint64(data[off:], s.canary)
	}
	s.used = 0
}

// touch notes that n bytes of data are overwritten.
func (s *slot) touch(n int) { s.used = max(s.used, n) }

// found decodes the request in the slot, when there is one and its length is possible.
func (s *slot) found() (h inHeader, ok bool) {
	h = decodeInHeader(s.request())
	return h, h.len >= inHeaderSize && int64(h.len) <= int64(len(s.mem)-slotRequest)
}

// whole reports whether all of the request with header h is in the slot. The
// kernel copies page by page: when it has begun with the last, it has all.
func (s *slot) whole(h inHeader) bool {
	last := slotRequest + int(h.len) - 1
	if last < slotData {
		return true
	}
	return wire.Uint64(s.mem[last&^(pageSize-1):]) != s.canary
}
