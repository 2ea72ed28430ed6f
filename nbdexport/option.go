package nbdexport

import (
	"encoding/binary"
	"errors"
)

// errOption is what the decoders of option data return: lengths and counts do
// not add up.
var errOption = errors.New("lengths in the option do not add up")

// errStringTooLong is what the decoders return for a name or query longer than
// maxString.
var errStringTooLong = errors.New("string longer than 4096 bytes")

// An optionHeader starts each option.
//
//	Offset  Size  Field   Meaning
//	     0     8  magic   "IHAVEOPT"
//	     8     4  option
//	    12     4  length  bytes of data that follow
//
// Spec: NBD proto.md "Newstyle negotiation".
type optionHeader struct {
	magic  uint64
	option option
	length uint32
}

const optionHeaderSize = 16 // bytes

func decodeOptionHeader(b []byte) optionHeader {
	_ = b[optionHeaderSize-1]
	return optionHeader{
		magic:  binary.BigEndian.Uint64(b),
		option: option(binary.BigEndian.Uint32(b[8:])),
		length: binary.BigEndian.Uint32(b[12:]),
	}
}

func appendOptionHeader(b []byte, o option, length int) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// appendOptionReply appends the header of an answer to o and its data.
//
//	Offset  Size  Field   Meaning
//	     0     8  magic   0x3e889045565a9
//	     8     4  option  the one that is answered
//	    12     4  type    optionReply
//	    16     4  length  bytes of data that follow
//
// Spec: NBD proto.md "Fixed newstyle negotiation".
func appendOptionReply(b []byte, o option, r optionReply, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOptionReply)
	b = binary.BigEndian.AppendUint32(b, uint32(o))
	b = binary.BigEndian.AppendUint32(b, uint32(r))
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// An infoRequest is the data of INFO and GO.
//
//	Offset  Size  Field  Meaning
//	     0     4  n      bytes of the name
//	     4     n  name   of the export
//	   4+n     2  k      number of infos
//	   6+n   2*k  infos  wanted besides EXPORT
//
// Spec: NBD proto.md "NBD_OPT_INFO".
type infoRequest struct {
	name  string
	infos []info
}

func decodeInfoRequest(b []byte) (infoRequest, error) {
	name, b, err := cutString(b)
	if err != nil {
		return infoRequest{}, err
	}
	if len(b) < 2 || len(b) != 2+2*int(binary.BigEndian.Uint16(b)) {
		return infoRequest{}, errOption
	}
	q := infoRequest{name: name}
	for b = b[2:]; len(b) > 0; b = b[2:] {
		q.infos = append(q.infos, info(binary.BigEndian.Uint16(b)))
	}
	return q, nil
}

func (q *infoRequest) append(b []byte) []byte {
	b = appendString(b, q.name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(q.infos)))
	for _, i := range q.infos {
		b = binary.BigEndian.AppendUint16(b, uint16(i))
	}
	return b
}

// A contextRequest is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
//
//	Offset  Size  Field    Meaning
//	     0     4  n        bytes of the name
//	     4     n  name     of the export
//	   4+n     4  k        number of queries
//	   8+n     -  queries  each 4 bytes length and the text
//
// Spec: NBD proto.md "NBD_OPT_LIST_META_CONTEXT".
type contextRequest struct {
	name    string
	queries []string
}

func decodeContextRequest(b []byte) (contextRequest, error) {
	name, b, err := cutString(b)
	if err != nil {
		return contextRequest{}, err
	}
	if len(b) < 4 {
		return contextRequest{}, errOption
	}
	count := binary.BigEndian.Uint32(b)
	b = b[4:]
	q := contextRequest{name: name}
	for ; count > 0; count-- { // ends with b: each query takes at least 4 bytes of it
		var query string
		if query, b, err = cutString(b); err != nil {
			return contextRequest{}, err
		}
		q.queries = append(q.queries, query)
	}
	if len(b) != 0 {
		return contextRequest{}, errOption
	}
	return q, nil
}

func (q *contextRequest) append(b []byte) []byte {
	b = appendString(b, q.name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(q.queries)))
	for _, s := range q.queries {
		b = appendString(b, s)
	}
	return b
}

// cutString splits b after a string that its length in 4 bytes precedes.
func cutString(b []byte) (s string, rest []byte, err error) {
	if len(b) < 4 {
		return "", nil, errOption
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxString {
		return "", nil, errStringTooLong
	}
	if int(n) > len(b)-4 {
		return "", nil, errOption
	}
	return string(b[4 : 4+n]), b[4+n:], nil
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// appendInfoExport appends the data of an INFO reply that describes an export.
//
//	Offset  Size  Field  Meaning
//	     0     2  type   infoExport
//	     2     8  size   bytes
//	    10     2  flags  TransmissionFlags
func appendInfoExport(b []byte, size int64, flags TransmissionFlags) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(infoExport))
	b = binary.BigEndian.AppendUint64(b, uint64(size))
	return binary.BigEndian.AppendUint16(b, uint16(flags))
}

// appendInfoText appends the data of an INFO reply of type infoName or
// infoDescription: 2 bytes type, then the text.
func appendInfoText(b []byte, i info, text string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(i))
	return append(b, text...)
}

// appendInfoBlockSize appends the data of an INFO reply with the limits of
// requests.
//
//	Offset  Size  Field      Meaning
//	     0     2  type       infoBlockSize
//	     2     4  minimum    bytes; offsets and lengths are multiples of it
//	     6     4  preferred  bytes
//	    10     4  maximum    bytes of payload
func appendInfoBlockSize(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(infoBlockSize))
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, preferredBlock)
	return binary.BigEndian.AppendUint32(b, maxPayload)
}
