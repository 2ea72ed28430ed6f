package nbdexport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// errAborted ends a handshake that the client gave up in good order.
var errAborted = errors.New("nbdexport: client aborted the handshake")

// A handshake is the newstyle negotiation with one client: a greeting, then
// options, until one of them starts the transmission phase. It touches no
// backend except for its Size.
//
//	greeting -> option* -> EXPORT_NAME or GO -> transmission
//	                    -> ABORT, breach, too many options -> closed
//
// What a client sends is bounded before memory is allocated for it. A breach
// after which the two sides cannot agree on the position in the stream ends
// the connection with ErrProtocol; everything else is answered with an error,
// and the client may go on.
type handshake struct {
	conn   io.ReadWriter // with a deadline for the whole handshake
	lookup func(name string) *Export
	list   func() []*Export
	single bool // the server takes one connection at a time

	fixed    bool // the client takes part in option haggling
	noZeroes bool // the client does without the padding of EXPORT_NAME
	terms    terms
	// contextsOf is the export name that terms.contexts were selected for.
	contextsOf string

	export *Export // the outcome
	buf    []byte  // the data of one option
	out    []byte  // replies to one option, sent together
}

// run negotiates, and returns nil when the transmission phase begins:
// h.export and h.terms hold.
func (h *handshake) run() error {
	if err := h.greet(); err != nil {
		return err
	}
	for range maxOptions {
		done, err := h.option()
		if err != nil || done {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d options", ErrProtocol, maxOptions)
}

// greet exchanges the first bytes and flags.
//
//	S: 8 "NBDMAGIC", 8 "IHAVEOPT", 2 handshake flags
//	C: 4 client flags
//
// Spec: NBD proto.md "Newstyle negotiation".
func (h *handshake) greet() error {
	b := binary.BigEndian.AppendUint64(nil, magicServer)
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint16(b, handshakeFixedNewstyle|handshakeNoZeroes)
	if _, err := h.conn.Write(b); err != nil {
		return err
	}
	var answer [4]byte
	if _, err := io.ReadFull(h.conn, answer[:]); err != nil {
		return err
	}
	flags := binary.BigEndian.Uint32(answer[:])
	if flags&^(handshakeFixedNewstyle|handshakeNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x: unknown", ErrProtocol, flags)
	}
	h.fixed = flags&handshakeFixedNewstyle != 0
	h.noZeroes = flags&handshakeNoZeroes != 0
	return nil
}

// option reads and answers one option. done means that the transmission phase
// begins.
func (h *handshake) option() (done bool, err error) {
	var head [optionHeaderSize]byte
	if _, err := io.ReadFull(h.conn, head[:]); err != nil {
		return false, err
	}
	o := decodeOptionHeader(head[:])
	switch {
	case o.magic != magicOption:
		return false, fmt.Errorf("%w: option magic %#x", ErrProtocol, o.magic)
	case !h.fixed && o.option != optExportName:
		return false, fmt.Errorf("%w: option %v from a client that is not fixed newstyle", ErrProtocol, o.option)
	case o.length > maxOptionBytes:
		return false, fmt.Errorf("%w: option %v of %d bytes: want at most %d", ErrProtocol, o.option, o.length, maxOptionBytes)
	}
	h.buf = slices.Grow(h.buf[:0], int(o.length))[:o.length]
	if _, err := io.ReadFull(h.conn, h.buf); err != nil {
		return false, err
	}
	h.out = h.out[:0]
	done, err = h.answer(o.option, h.buf)
	if err != nil {
		return false, err
	}
	_, err = h.conn.Write(h.out)
	return done, err
}

// answer puts the replies to o into h.out. An error closes the connection
// without a reply.
func (h *handshake) answer(o option, data []byte) (done bool, err error) {
	switch o {
	case optExportName:
		return true, h.answerExportName(string(data))
	case optAbort:
		h.reply(o, repAck, nil)
		h.conn.Write(h.out) // the client may have gone already: it owes us nothing
		return false, errAborted
	case optGo, optInfo:
		return h.answerInfo(o, data), nil
	case optListMetaContext, optSetMetaContext:
		h.answerContexts(o, data)
	case optStartTLS:
		h.refuse(o, repErrPolicy, "TLS is not configured")
	case optList, optStructuredReply, optExtendedHeaders:
		if len(data) != 0 {
			h.refuse(o, repErrInvalid, "the option takes no data")
			break
		}
		h.answerPlain(o)
	default:
		h.refuse(o, repErrUnsupported, "unknown option")
	}
	return false, nil
}

// answerPlain answers options without data.
func (h *handshake) answerPlain(o option) {
	switch {
	case o == optList:
		for _, e := range h.list() {
			h.reply(o, repServer, append(appendString(nil, e.Name), e.Description...))
		}
	case o == optExtendedHeaders:
		if h.terms.extended {
			h.refuse(o, repErrInvalid, "negotiated already")
			return
		}
		h.terms.extended, h.terms.structured = true, true
	case h.terms.extended:
		h.refuse(o, repErrExtHeaderReqd, "extended headers are negotiated already")
		return
	case h.terms.structured:
		h.refuse(o, repErrInvalid, "negotiated already")
		return
	default:
		h.terms.structured = true
	}
	h.reply(o, repAck, nil)
}

// answerExportName starts the transmission phase the old way, which knows no
// error: an unknown name closes the connection.
//
//	S: 8 size, 2 transmission flags, 124 zeroes unless NO_ZEROES
//
// Spec: NBD proto.md "NBD_OPT_EXPORT_NAME".
func (h *handshake) answerExportName(name string) error {
	if len(name) > maxString {
		return fmt.Errorf("%w: export name: %w", ErrProtocol, errStringTooLong)
	}
	e := h.lookup(name)
	if e == nil {
		return fmt.Errorf("nbdexport: no export %q", name)
	}
	h.choose(e)
	h.out = binary.BigEndian.AppendUint64(h.out, uint64(e.Backend.Size()))
	h.out = binary.BigEndian.AppendUint16(h.out, uint16(h.terms.flags))
	if !h.noZeroes {
		h.out = append(h.out, make([]byte, 124)...)
	}
	return nil
}

// answerInfo answers INFO, and GO, which starts the transmission phase.
func (h *handshake) answerInfo(o option, data []byte) (done bool) {
	q, err := decodeInfoRequest(data)
	if err != nil {
		h.refuseData(o, err)
		return false
	}
	e := h.lookup(q.name)
	if e == nil {
		h.refuse(o, repErrUnknown, fmt.Sprintf("no export %q", q.name))
		return false
	}
	h.reply(o, repInfo, appendInfoExport(nil, e.Backend.Size(), h.flagsOf(e)))
	slices.Sort(q.infos)
	for _, i := range slices.Compact(q.infos) {
		switch i {
		case infoName:
			h.reply(o, repInfo, appendInfoText(nil, i, e.Name))
		case infoDescription:
			if e.Description != "" {
				h.reply(o, repInfo, appendInfoText(nil, i, e.Description))
			}
		case infoBlockSize:
			h.reply(o, repInfo, appendInfoBlockSize(nil))
		}
	}
	h.reply(o, repAck, nil)
	if o == optInfo {
		return false
	}
	h.choose(e)
	return true
}

// answerContexts answers LIST_META_CONTEXT and SET_META_CONTEXT.
func (h *handshake) answerContexts(o option, data []byte) {
	if o == optSetMetaContext {
		h.terms.contexts = 0 // also when the option fails
	}
	q, err := decodeContextRequest(data)
	switch {
	case err != nil:
		h.refuseData(o, err)
		return
	case !h.terms.structured:
		h.refuse(o, repErrInvalid, "structured replies must be negotiated first")
		return
	case h.lookup(q.name) == nil:
		h.refuse(o, repErrUnknown, fmt.Sprintf("no export %q", q.name))
		return
	}
	for _, c := range metaContexts {
		if !contextMatches(c.name, q.queries, o == optListMetaContext) {
			continue
		}
		id := uint32(0) // "reserved" in a listing
		if o == optSetMetaContext {
			h.terms.contexts |= 1 << c.id
			h.contextsOf = q.name
			id = uint32(c.id)
		}
		h.reply(o, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), c.name...))
	}
	h.reply(o, repAck, nil)
}

// contextMatches reports whether the queries select the context name. In a
// listing, a bare namespace ("qemu:") selects all of it, and no query at all
// selects everything.
func contextMatches(name string, queries []string, listing bool) bool {
	if listing && len(queries) == 0 {
		return true
	}
	for _, q := range queries {
		if q == name || listing && strings.HasSuffix(q, ":") && strings.HasPrefix(name, q) {
			return true
		}
	}
	return false
}

// choose fixes the outcome: e is what the transmission phase serves.
func (h *handshake) choose(e *Export) {
	h.export = e
	h.terms.flags = h.flagsOf(e)
	if h.contextsOf != e.Name {
		h.terms.contexts = 0 // selected for another export
	}
}

// flagsOf returns what can be promised about e with what is negotiated so far.
func (h *handshake) flagsOf(e *Export) TransmissionFlags {
	flags := e.TransmissionFlags()
	if !h.terms.structured {
		flags &^= FlagSendDF // a simple reply cannot be fragmented anyway
	}
	if h.single {
		flags &^= FlagCanMultiConn // a second connection would wait for the end of the first
	}
	return flags
}

// reply adds one reply to the answer to o.
func (h *handshake) reply(o option, r optionReply, data []byte) {
	h.out = appendOptionReply(h.out, o, r, data)
}

// refuse answers o with an error and a message for people.
func (h *handshake) refuse(o option, r optionReply, message string) {
	h.reply(o, r, []byte(message))
}

// refuseData answers an option whose data cannot be decoded.
func (h *handshake) refuseData(o option, err error) {
	r := repErrInvalid
	if errors.Is(err, errStringTooLong) {
		r = repErrTooBig
	}
	h.refuse(o, r, err.Error())
}
