package nbdtest

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// clientTimeout bounds every wait of a Client for the server, so that a server
// that says nothing fails the test.
const clientTimeout = 2 * time.Minute

// Numbers of the protocol that tests speak about. They are written down a
// second time here so that a wrong one in the server is not right in its tests.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptPeekExport      = 4
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMetaContext = 9
	OptSetMetaContext  = 10
	OptExtendedHeaders = 11

	RepAck              = 1
	RepServer           = 2
	RepInfo             = 3
	RepMetaContext      = 4
	RepErrUnsupported   = 1<<31 + 1
	RepErrPolicy        = 1<<31 + 2
	RepErrInvalid       = 1<<31 + 3
	RepErrUnknown       = 1<<31 + 6
	RepErrTooBig        = 1<<31 + 9
	RepErrExtHeaderReqd = 1<<31 + 10

	CmdRead        = 0
	CmdWrite       = 1
	CmdDisconnect  = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdCache       = 5
	CmdWriteZeroes = 6
	CmdBlockStatus = 7

	FlagFUA        = 1 << 0
	FlagNoHole     = 1 << 1
	FlagDF         = 1 << 2
	FlagReqOne     = 1 << 3
	FlagFastZero   = 1 << 4
	FlagPayloadLen = 1 << 5

	ChunkNone           = 0
	ChunkOffsetData     = 1
	ChunkOffsetHole     = 2
	ChunkBlockStatus    = 5
	ChunkBlockStatusExt = 6
	ChunkError          = 1<<15 + 1
	ChunkErrorOffset    = 1<<15 + 2
)

// A Client speaks NBD to a server under test, message by message, and lets a
// test send anything. Whatever goes wrong ends the test.
type Client struct {
	Conn       net.Conn
	Structured bool // what has been negotiated
	Extended   bool

	t     testing.TB
	reads map[uint64]int // lengths of reads under way, by cookie
}

// NewClient returns a Client on conn, which the test's end closes.
func NewClient(t testing.TB, conn net.Conn) *Client {
	t.Cleanup(func() { conn.Close() })
	return &Client{Conn: conn, t: t, reads: make(map[uint64]int)}
}

// Write sends raw bytes.
func (c *Client) Write(b []byte) {
	c.t.Helper()
	c.Conn.SetWriteDeadline(time.Now().Add(clientTimeout))
	if _, err := c.Conn.Write(b); err != nil {
		c.t.Fatalf("client: write: %v", err)
	}
}

// Read receives n raw bytes.
func (c *Client) Read(n int) []byte {
	c.t.Helper()
	c.Conn.SetReadDeadline(time.Now().Add(clientTimeout))
	b := make([]byte, n)
	if _, err := io.ReadFull(c.Conn, b); err != nil {
		c.t.Fatalf("client: read of %d bytes: %v", n, err)
	}
	return b
}

// ExpectClosed waits until the server has closed the connection, and fails if
// it says anything before.
func (c *Client) ExpectClosed() {
	c.t.Helper()
	c.Conn.SetReadDeadline(time.Now().Add(clientTimeout))
	var b [1]byte
	n, err := c.Conn.Read(b[:])
	switch {
	case n > 0:
		c.t.Fatalf("client: server sent %#x: want it to close the connection", b[0])
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.t.Fatal("client: server keeps the connection open: want it closed")
	}
}

// Greet receives the greeting and answers with client flags.
func (c *Client) Greet(flags uint32) {
	c.t.Helper()
	b := c.Read(18)
	if string(b[:16]) != "NBDMAGICIHAVEOPT" {
		c.t.Fatalf("client: greeting %q", b[:16])
	}
	if got := binary.BigEndian.Uint16(b[16:]); got != 3 {
		c.t.Fatalf("client: handshake flags %#x: want 3", got)
	}
	c.Write(binary.BigEndian.AppendUint32(nil, flags))
}

// An OptionReply is one answer to an option.
type OptionReply struct {
	Type uint32
	Data []byte
}

// SendOption sends an option and its data.
func (c *Client) SendOption(option uint32, data []byte) {
	c.t.Helper()
	c.Write(append(OptionHeader(option, uint32(len(data))), data...))
}

// OptionHeader encodes the header of an option that claims length bytes.
func OptionHeader(option, length uint32) []byte {
	b := []byte("IHAVEOPT")
	b = binary.BigEndian.AppendUint32(b, option)
	return binary.BigEndian.AppendUint32(b, length)
}

// Option sends an option and returns the replies to it, the final one last.
func (c *Client) Option(option uint32, data []byte) []OptionReply {
	c.t.Helper()
	c.SendOption(option, data)
	var replies []OptionReply
	for {
		b := c.Read(20)
		if magic := binary.BigEndian.Uint64(b); magic != 0x3e889045565a9 {
			c.t.Fatalf("client: option reply magic %#x", magic)
		}
		if got := binary.BigEndian.Uint32(b[8:]); got != option {
			c.t.Fatalf("client: reply to option %d: want one to %d", got, option)
		}
		r := OptionReply{Type: binary.BigEndian.Uint32(b[12:])}
		r.Data = c.Read(int(binary.BigEndian.Uint32(b[16:])))
		replies = append(replies, r)
		if r.Type == RepAck || r.Type >= 1<<31 {
			return replies
		}
	}
}

// MustOption is Option, and fails unless the final reply is of type want.
func (c *Client) MustOption(option uint32, data []byte, want uint32) []OptionReply {
	c.t.Helper()
	replies := c.Option(option, data)
	last := replies[len(replies)-1]
	if last.Type != want {
		c.t.Fatalf("client: option %d: reply %#x (%q): want %#x", option, last.Type, last.Data, want)
	}
	return replies
}

// InfoData encodes the data of INFO and GO.
func InfoData(name string, infos ...uint16) []byte {
	b := stringData(name)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// ContextData encodes the data of LIST_META_CONTEXT and SET_META_CONTEXT.
func ContextData(name string, queries ...string) []byte {
	b := stringData(name)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = append(b, stringData(q)...)
	}
	return b
}

func stringData(s string) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...)
}

// A Mode is the form of replies that a Client negotiates.
type Mode string

// The values of Mode.
const (
	Simple     Mode = "simple"
	Structured Mode = "structured"
	Extended   Mode = "extended"
)

// Modes lists all of them.
var Modes = []Mode{Simple, Structured, Extended}

// Start performs a whole handshake for the export name and returns its size and
// transmission flags. contexts are selected, and must exist.
func (c *Client) Start(name string, mode Mode, contexts ...string) (size uint64, flags uint16) {
	c.t.Helper()
	c.Greet(3)
	switch mode {
	case Structured:
		c.MustOption(OptStructuredReply, nil, RepAck)
		c.Structured = true
	case Extended:
		c.MustOption(OptExtendedHeaders, nil, RepAck)
		c.Structured, c.Extended = true, true
	}
	if len(contexts) > 0 {
		replies := c.MustOption(OptSetMetaContext, ContextData(name, contexts...), RepAck)
		if len(replies) != len(contexts)+1 {
			c.t.Fatalf("client: %d contexts selected: want %d", len(replies)-1, len(contexts))
		}
	}
	for _, r := range c.MustOption(OptGo, InfoData(name), RepAck) {
		if r.Type == RepInfo && binary.BigEndian.Uint16(r.Data) == 0 {
			size = binary.BigEndian.Uint64(r.Data[2:])
			flags = binary.BigEndian.Uint16(r.Data[10:])
		}
	}
	return size, flags
}

// A Request is one request. Payload follows the header as it is, whatever Len
// says.
type Request struct {
	Flags   uint16
	Type    uint16
	Cookie  uint64
	Off     uint64
	Len     uint64
	Payload []byte
}

// Encode returns r's bytes.
func (r Request) Encode(extended bool) []byte {
	magic := uint32(0x25609513)
	if extended {
		magic = 0x21e41c71
	}
	b := binary.BigEndian.AppendUint32(nil, magic)
	b = binary.BigEndian.AppendUint16(b, r.Flags)
	b = binary.BigEndian.AppendUint16(b, r.Type)
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Off)
	if extended {
		b = binary.BigEndian.AppendUint64(b, r.Len)
	} else {
		b = binary.BigEndian.AppendUint32(b, uint32(r.Len))
	}
	return append(b, r.Payload...)
}

// Send sends r.
func (c *Client) Send(r Request) {
	c.t.Helper()
	c.Expect(r)
	c.Write(r.Encode(c.Extended))
}

// Expect notes that the bytes of r have been, or will be, sent with Write.
func (c *Client) Expect(r Request) {
	if r.Type == CmdRead {
		c.reads[r.Cookie] = int(r.Len)
	}
}

// An Extent is what BLOCK_STATUS tells about a range.
type Extent struct {
	Len   uint64
	State uint64
}

// A Message is one simple reply or one chunk.
type Message struct {
	Cookie  uint64
	Done    bool // nothing else follows for this request
	Type    uint16
	Err     syscall.Errno
	Text    string // of an error
	Off     uint64 // of data or of a hole
	Hole    uint64 // bytes
	Data    []byte
	Context uint32
	Extents []Extent
}

// Receive returns the next message.
func (c *Client) Receive() Message {
	c.t.Helper()
	b := c.Read(4)
	magic := binary.BigEndian.Uint32(b)
	switch {
	case magic == 0x67446698 && !c.Extended:
		return c.receiveSimple()
	case magic == 0x668e33ef && c.Structured && !c.Extended:
		b = c.Read(16)
		return c.receiveChunk(b, uint64(binary.BigEndian.Uint32(b[12:])))
	case magic == 0x6e8a278c && c.Extended:
		b = c.Read(28)
		return c.receiveChunk(b, binary.BigEndian.Uint64(b[20:]))
	}
	c.t.Fatalf("client: reply magic %#x (structured %v, extended %v)", magic, c.Structured, c.Extended)
	return Message{}
}

func (c *Client) receiveSimple() Message {
	c.t.Helper()
	b := c.Read(12)
	m := Message{Done: true, Err: syscall.Errno(binary.BigEndian.Uint32(b)), Cookie: binary.BigEndian.Uint64(b[4:])}
	n, isRead := c.reads[m.Cookie]
	delete(c.reads, m.Cookie)
	if isRead && c.Structured {
		c.t.Fatal("client: simple reply to a read although structured replies are negotiated")
	}
	if isRead && m.Err == 0 {
		m.Data = c.Read(n)
	}
	return m
}

// receiveChunk receives a chunk after its header: flags, type and cookie are in
// b.
func (c *Client) receiveChunk(b []byte, length uint64) Message {
	c.t.Helper()
	m := Message{
		Done:   binary.BigEndian.Uint16(b)&1 != 0,
		Type:   binary.BigEndian.Uint16(b[2:]),
		Cookie: binary.BigEndian.Uint64(b[4:]),
	}
	if length > 40<<20 {
		c.t.Fatalf("client: chunk of %d bytes", length)
	}
	if m.Done {
		delete(c.reads, m.Cookie)
	}
	body := c.Read(int(length))
	switch m.Type {
	case ChunkNone:
		if !m.Done || length != 0 {
			c.t.Fatalf("client: NONE chunk of %d bytes, done %v", length, m.Done)
		}
	case ChunkOffsetData:
		if length < 9 {
			c.t.Fatalf("client: data chunk of %d bytes: want at least 9", length)
		}
		m.Off, m.Data = binary.BigEndian.Uint64(body), body[8:]
	case ChunkOffsetHole:
		m.Off, m.Hole = binary.BigEndian.Uint64(body), uint64(binary.BigEndian.Uint32(body[8:]))
		if length != 12 || m.Hole == 0 {
			c.t.Fatalf("client: hole of %d bytes in a chunk of %d", m.Hole, length)
		}
	case ChunkBlockStatus:
		m.Context = binary.BigEndian.Uint32(body)
		for body = body[4:]; len(body) > 0; body = body[8:] {
			m.Extents = append(m.Extents, Extent{uint64(binary.BigEndian.Uint32(body)), uint64(binary.BigEndian.Uint32(body[4:]))})
		}
	case ChunkBlockStatusExt:
		m.Context = binary.BigEndian.Uint32(body)
		if got, want := int(binary.BigEndian.Uint32(body[4:])), (len(body)-8)/16; got != want {
			c.t.Fatalf("client: chunk counts %d extents and holds %d", got, want)
		}
		for body = body[8:]; len(body) > 0; body = body[16:] {
			m.Extents = append(m.Extents, Extent{binary.BigEndian.Uint64(body), binary.BigEndian.Uint64(body[8:])})
		}
	case ChunkError, ChunkErrorOffset:
		m.Err = syscall.Errno(binary.BigEndian.Uint32(body))
		m.Text = string(body[6 : 6+binary.BigEndian.Uint16(body[4:])])
	default:
		c.t.Fatalf("client: chunk type %#x", m.Type)
	}
	return m
}

// A Reply is everything that the server said to one request.
type Reply struct {
	Err     syscall.Errno
	Text    string
	Data    []byte // of a read, holes filled with zeroes
	Chunks  int
	Holes   int
	Extents map[uint32][]Extent // by context
}

// Do sends r, whose cookie no other request under way has, and receives its
// whole reply. Nothing else may be under way.
func (c *Client) Do(r Request) Reply {
	c.t.Helper()
	c.Send(r)
	return c.Collect(r)
}

// Collect receives the whole reply to r.
func (c *Client) Collect(r Request) Reply {
	c.t.Helper()
	reply := Reply{Extents: make(map[uint32][]Extent)}
	if r.Type == CmdRead {
		reply.Data = make([]byte, min(r.Len, 64<<20))
	}
	covered := uint64(0)
	for {
		m := c.Receive()
		if m.Cookie != r.Cookie {
			c.t.Fatalf("client: reply to cookie %#x: want %#x", m.Cookie, r.Cookie)
		}
		reply.Chunks++
		switch {
		case m.Err != 0:
			reply.Err, reply.Text, reply.Data = m.Err, m.Text, nil
		case m.Hole > 0:
			reply.Holes++
			covered += m.Hole
		case m.Data != nil && r.Type == CmdRead:
			at := uint64(0)
			if c.Structured {
				at = m.Off - r.Off
			}
			covered += uint64(copy(reply.Data[at:], m.Data))
		case m.Extents != nil:
			reply.Extents[m.Context] = m.Extents
		}
		if m.Done {
			break
		}
	}
	if r.Type == CmdRead && reply.Err == 0 && covered != r.Len {
		c.t.Fatalf("client: read of %d bytes: reply covers %d", r.Len, covered)
	}
	return reply
}
