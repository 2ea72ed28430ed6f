package nbdexport

import (
	"encoding/binary"
	"fmt"
	"math"
	"syscall"
)

// request is one request of the transmission phase, without its payload.
//
// Compact, before extended headers are negotiated:
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   0x25609513
//	     4     2  flags   commandFlags
//	     6     2  type    command
//	     8     8  cookie  the client's; returned unchanged
//	    16     8  offset  bytes
//	    24     4  length  bytes of the range; of a WRITE, also of the payload that follows
//
// Extended:
//
//	Offset  Size  Field   Meaning
//	     0     4  magic   0x21e41c71
//	     4     2  flags   commandFlags
//	     6     2  type    command
//	     8     8  cookie  the client's; returned unchanged
//	    16     8  offset  bytes
//	    24     8  length  of the payload that follows with PAYLOAD_LEN, else of the range
//
// Spec: NBD proto.md "Request message", "Extended request message".
type request struct {
	cookie uint64
	off    uint64 // bytes; inside the export once validated
	n      uint64 // length of the range in bytes
	cmd    command
	flags  commandFlags
}

const (
	requestSize         = 28 // bytes
	requestSizeExtended = 32
)

// decodeRequest decodes a compact request from b, which holds requestSize bytes.
func decodeRequest(b []byte) (request, error) {
	_ = b[requestSize-1]
	if magic := binary.BigEndian.Uint32(b); magic != magicRequest {
		return request{}, fmt.Errorf("%w: request magic %#x: want %#x", ErrProtocol, magic, uint32(magicRequest))
	}
	r := decodeRequestCommon(b)
	r.n = uint64(binary.BigEndian.Uint32(b[24:]))
	return r, nil
}

// decodeRequestExtended decodes an extended request from b, which holds
// requestSizeExtended bytes.
func decodeRequestExtended(b []byte) (request, error) {
	_ = b[requestSizeExtended-1]
	if magic := binary.BigEndian.Uint32(b); magic != magicRequestExt {
		return request{}, fmt.Errorf("%w: extended request magic %#x: want %#x", ErrProtocol, magic, uint32(magicRequestExt))
	}
	r := decodeRequestCommon(b)
	r.n = binary.BigEndian.Uint64(b[24:])
	return r, nil
}

func decodeRequestCommon(b []byte) request {
	return request{
		flags:  commandFlags(binary.BigEndian.Uint16(b[4:])),
		cmd:    command(binary.BigEndian.Uint16(b[6:])),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
	}
}

// encode writes r into b in the compact form, which holds requestSize bytes.
// r.n fits 32 bits.
func (r *request) encode(b []byte) {
	_ = b[requestSize-1]
	binary.BigEndian.PutUint32(b, magicRequest)
	r.encodeCommon(b)
	binary.BigEndian.PutUint32(b[24:], uint32(r.n))
}

// encodeExtended writes r into b, which holds requestSizeExtended bytes.
func (r *request) encodeExtended(b []byte) {
	_ = b[requestSizeExtended-1]
	binary.BigEndian.PutUint32(b, magicRequestExt)
	r.encodeCommon(b)
	binary.BigEndian.PutUint64(b[24:], r.n)
}

func (r *request) encodeCommon(b []byte) {
	binary.BigEndian.PutUint16(b[4:], uint16(r.flags))
	binary.BigEndian.PutUint16(b[6:], uint16(r.cmd))
	binary.BigEndian.PutUint64(b[8:], r.cookie)
	binary.BigEndian.PutUint64(b[16:], r.off)
}

func (r *request) String() string {
	return fmt.Sprintf("%v at %#x, %d bytes, flags %v", r.cmd, r.off, r.n, r.flags)
}

// payload returns the number of payload bytes that follow r's header. Their
// count must be known, and be bearable, before anything else about r is
// judged: with more than maxPayload there is no way but to close.
func (r *request) payload(extended bool) (int, error) {
	carries := r.cmd == cmdWrite || extended && r.flags&flagPayloadLen != 0
	if !carries {
		return 0, nil
	}
	if r.n > maxPayload {
		return 0, fmt.Errorf("%w: %v: payload beyond the limit of %d bytes", ErrProtocol, r, maxPayload)
	}
	return int(r.n), nil
}

// A terms holds what the two sides agreed on for the transmission phase.
type terms struct {
	flags      TransmissionFlags
	structured bool
	extended   bool // implies structured
	contexts   uint32
}

// hasContext reports whether the client has selected id.
func (t *terms) hasContext(id metaContext) bool { return t.contexts&(1<<id) != 0 }

// validate rejects a request that the client must not send under t, with the
// error of the reply and a reason for people. size is the export's. After a
// nil error the range lies inside the export and everything the command needs
// has been negotiated.
func (t *terms) validate(r *request, size int64) (syscall.Errno, string) {
	allowed := commandFlags(0)
	if t.flags&FlagSendFUA != 0 {
		allowed |= flagFUA // harmless where nothing is written
	}
	outside := syscall.EINVAL
	switch r.cmd {
	case cmdRead:
		if t.structured {
			allowed |= flagDF
		}
		if r.n > maxPayload {
			return syscall.EINVAL, "length beyond 32 MiB"
		}
	case cmdWrite:
		if t.extended {
			allowed |= flagPayloadLen
		}
		outside = syscall.ENOSPC
	case cmdWriteZeroes:
		// A read-only export announces no change, and says EPERM below.
		if t.flags&(FlagSendWriteZeroes|FlagReadOnly) == 0 {
			return syscall.EINVAL, "not announced"
		}
		allowed |= flagNoHole
		if t.flags&FlagSendFastZero != 0 {
			allowed |= flagFastZero
		}
		outside = syscall.ENOSPC
	case cmdTrim:
		if t.flags&(FlagSendTrim|FlagReadOnly) == 0 {
			return syscall.EINVAL, "not announced"
		}
	case cmdCache:
		if t.flags&FlagSendCache == 0 {
			return syscall.EINVAL, "not announced"
		}
	case cmdBlockStatus:
		allowed |= flagReqOne
		if t.contexts == 0 {
			return syscall.EINVAL, "no metadata context negotiated"
		}
		if r.n == 0 {
			return syscall.EINVAL, "length 0"
		}
	case cmdFlush:
		if t.flags&FlagSendFlush == 0 {
			return syscall.EINVAL, "not announced"
		}
		if r.flags&^allowed != 0 {
			return syscall.EINVAL, "flag unknown, or not for this command"
		}
		return 0, ""
	default:
		return syscall.EINVAL, "unknown command"
	}
	if r.flags&^allowed != 0 {
		return syscall.EINVAL, "flag unknown, or not for this command"
	}
	if r.off > math.MaxInt64 || r.n > math.MaxInt64 || int64(r.off) > size || int64(r.n) > size-int64(r.off) {
		return outside, "range beyond the end of the export"
	}
	if r.modifies() && t.flags&FlagReadOnly != 0 {
		return syscall.EPERM, "export is read-only"
	}
	return 0, ""
}

// modifies reports whether r changes content.
func (r *request) modifies() bool {
	return r.cmd == cmdWrite || r.cmd == cmdWriteZeroes || r.cmd == cmdTrim
}
