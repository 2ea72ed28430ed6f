package nbdexport

import (
	"context"
	"encoding/binary"
	"errors"
	"syscall"
)

// wireError is an error number of the protocol; they have the values of Linux.
//
// Spec: NBD proto.md "Error values".
type wireError uint32

const (
	wireOK       wireError = 0
	wirePERM     wireError = 1
	wireIO       wireError = 5
	wireNOMEM    wireError = 12
	wireINVAL    wireError = 22
	wireNOSPC    wireError = 28
	wireOVERFLOW wireError = 75
	wireNOTSUP   wireError = 95
	wireSHUTDOWN wireError = 108
)

// wireErrorOf returns the number that tells err to a client: the one place
// where errors of backends become errors of the protocol. An error without a
// syscall.Errno in its tree is EIO, and so is an errno that the protocol lacks;
// only the end of the server has a number of its own.
func wireErrorOf(err error) wireError {
	if err == nil {
		return wireOK
	}
	if errors.Is(err, context.Canceled) {
		return wireSHUTDOWN
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return wireIO
	}
	switch errno {
	case syscall.EPERM, syscall.EROFS, syscall.EACCES:
		return wirePERM
	case syscall.ENOMEM:
		return wireNOMEM
	case syscall.EINVAL, syscall.EDOM:
		return wireINVAL
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return wireNOSPC
	case syscall.EOVERFLOW:
		return wireOVERFLOW
	case syscall.EOPNOTSUPP:
		return wireNOTSUP
	case syscall.ESHUTDOWN:
		return wireSHUTDOWN
	default:
		return wireIO
	}
}

// appendSimpleReply appends the header of a simple reply; the data of a
// successful READ follows it.
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   0x67446698
//	     4     4  error   wireError
//	     8     8  cookie  the request's
//
// Spec: NBD proto.md "Simple reply message".
func appendSimpleReply(b []byte, cookie uint64, err wireError) []byte {
	b = binary.BigEndian.AppendUint32(b, magicSimpleReply)
	b = binary.BigEndian.AppendUint32(b, uint32(err))
	return binary.BigEndian.AppendUint64(b, cookie)
}

// appendChunk appends the header of a reply chunk, in the form that t says.
// length bytes of content follow it.
//
// Structured:
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   0x668e33ef
//	     4     2  flags   chunkDone on the last chunk of a reply
//	     6     2  type    chunk
//	     8     8  cookie  the request's
//	    16     4  length  bytes that follow
//
// Extended:
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   0x6e8a278c
//	     4     2  flags   chunkDone on the last chunk of a reply
//	     6     2  type    chunk
//	     8     8  cookie  the request's
//	    16     8  offset  the request's
//	    24     8  length  bytes that follow
//
// Spec: NBD proto.md "Structured reply chunk message", "Extended reply chunk message".
func (t *terms) appendChunk(b []byte, r *request, flags uint16, typ chunk, length int) []byte {
	magic := uint32(magicChunk)
	if t.extended {
		magic = magicChunkExtended
	}
	b = binary.BigEndian.AppendUint32(b, magic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, uint16(typ))
	b = binary.BigEndian.AppendUint64(b, r.cookie)
	if t.extended {
		b = binary.BigEndian.AppendUint64(b, r.off)
		return binary.BigEndian.AppendUint64(b, uint64(length))
	}
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// appendDone appends a whole reply that carries no data and no error.
func (t *terms) appendDone(b []byte, r *request) []byte {
	if !t.structured {
		return appendSimpleReply(b, r.cookie, wireOK)
	}
	return t.appendChunk(b, r, chunkDone, chunkNone, 0)
}

// appendDataHeader appends what precedes n bytes read from off in a chunk:
//
//	Offset  Size  Field   Meaning
//	     0     8  offset  in the export
//	     8     n  data
func (t *terms) appendDataHeader(b []byte, r *request, flags uint16, off uint64, n int) []byte {
	b = t.appendChunk(b, r, flags, chunkOffsetData, 8+n)
	return binary.BigEndian.AppendUint64(b, off)
}

// appendHole appends a chunk that says that [off, off+n) reads as zeroes:
//
//	Offset  Size  Field   Meaning
//	     0     8  offset  in the export
//	     8     4  length  bytes
func (t *terms) appendHole(b []byte, r *request, flags uint16, off uint64, n uint32) []byte {
	b = t.appendChunk(b, r, flags, chunkOffsetHole, 12)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, n)
}

// appendError appends a reply that ends r with an error:
//
//	Offset  Size  Field    Meaning
//	     0     4  error    wireError
//	     4     2  length   bytes of the message
//	     6     -  message  for people
func (t *terms) appendError(b []byte, r *request, err wireError, message string) []byte {
	if !t.structured {
		return appendSimpleReply(b, r.cookie, err)
	}
	message = message[:min(len(message), maxString)]
	b = t.appendChunk(b, r, chunkDone, chunkError, 6+len(message))
	b = binary.BigEndian.AppendUint32(b, uint32(err))
	b = binary.BigEndian.AppendUint16(b, uint16(len(message)))
	return append(b, message...)
}

// A statusExtent describes a range of an export in one metadata context.
type statusExtent struct {
	n     uint64 // bytes
	state uint32 // meaning depends on the context
}

// statusExtentSize returns the bytes of one encoded extent.
func (t *terms) statusExtentSize() int {
	if t.extended {
		return 16
	}
	return 8
}

// appendBlockStatus appends a chunk with the extents of one context. The first
// starts at the request's offset, each other where its predecessor ends.
//
// Structured (BLOCK_STATUS):
//
//	Offset  Size  Field    Meaning
//	     0     4  context  metaContext
//	     4   8*k  extents  4 bytes length, 4 bytes state each
//
// Extended (BLOCK_STATUS_EXT):
//
//	Offset  Size  Field    Meaning
//	     0     4  context  metaContext
//	     4     4  count    of extents
//	     8  16*k  extents  8 bytes length, 8 bytes state each
//
// Spec: NBD proto.md "Structured reply types".
func (t *terms) appendBlockStatus(b []byte, r *request, flags uint16, id metaContext, extents []statusExtent) []byte {
	size := t.statusExtentSize() * len(extents)
	if t.extended {
		b = t.appendChunk(b, r, flags, chunkBlockStatusExt, 8+size)
		b = binary.BigEndian.AppendUint32(b, uint32(id))
		b = binary.BigEndian.AppendUint32(b, uint32(len(extents)))
		for _, e := range extents {
			b = binary.BigEndian.AppendUint64(b, e.n)
			b = binary.BigEndian.AppendUint64(b, uint64(e.state))
		}
		return b
	}
	b = t.appendChunk(b, r, flags, chunkBlockStatus, 4+size)
	b = binary.BigEndian.AppendUint32(b, uint32(id))
	for _, e := range extents {
		b = binary.BigEndian.AppendUint32(b, uint32(e.n))
		b = binary.BigEndian.AppendUint32(b, e.state)
	}
	return b
}
