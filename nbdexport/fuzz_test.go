package nbdexport_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"slices"
	"testing"
	"time"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// A recordedConn is a connection whose client has sent everything that it ever
// sends.
type recordedConn struct {
	net.Conn // nil: what is not below is not called
	in       bytes.Reader
	out      bytes.Buffer
}

func (c *recordedConn) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *recordedConn) Write(p []byte) (int, error)      { return c.out.Write(p) }
func (c *recordedConn) Close() error                     { return nil }
func (c *recordedConn) SetDeadline(time.Time) error      { return nil }
func (c *recordedConn) SetReadDeadline(time.Time) error  { return nil }
func (c *recordedConn) SetWriteDeadline(time.Time) error { return nil }

// serveRecorded serves a client that sends in, and returns what it is sent.
// Every call of the backend must be in range.
func serveRecorded(t *testing.T, in []byte) []byte {
	const size = 1 << 20
	m := nbdtest.NewMemory(size)
	m.Before = func(op string, off, n int64) error {
		if op != "flush" && (off < 0 || n <= 0 || off > size || n > size-off) {
			t.Errorf("%s of %d at %#x reaches the backend", op, n, off)
		}
		return nil
	}
	s := nbdexport.NewServer(nbdexport.ServerOptions{})
	if err := s.AddExport(&nbdexport.Export{Backend: m, Description: "fuzzed"}); err != nil {
		t.Fatal(err)
	}
	conn := &recordedConn{}
	conn.in.Reset(in)
	defer time.AfterFunc(5*time.Minute, func() { panic("a recorded client is served for ever") }).Stop()
	s.ServeConn(context.Background(), conn)
	return conn.out.Bytes()
}

// clientHello is what a client sends before its options.
var clientHello = []byte{0, 0, 0, 3}

func optionBytes(option uint32, data []byte) []byte {
	return append(nbdtest.OptionHeader(option, uint32(len(data))), data...)
}

func FuzzHandshake(f *testing.F) {
	name := nbdtest.InfoData("", 0, 1, 2, 3)
	for _, options := range [][]byte{
		optionBytes(nbdtest.OptExportName, nil),
		optionBytes(nbdtest.OptGo, name),
		slices.Concat(optionBytes(nbdtest.OptList, nil), optionBytes(nbdtest.OptInfo, name), optionBytes(nbdtest.OptAbort, nil)),
		slices.Concat(optionBytes(nbdtest.OptStructuredReply, nil),
			optionBytes(nbdtest.OptListMetaContext, nbdtest.ContextData("")),
			optionBytes(nbdtest.OptSetMetaContext, nbdtest.ContextData("", "base:allocation", "qemu:")),
			optionBytes(nbdtest.OptGo, name)),
		slices.Concat(optionBytes(nbdtest.OptExtendedHeaders, nil), optionBytes(nbdtest.OptStartTLS, nil)),
		nbdtest.OptionHeader(nbdtest.OptGo, 0xffffffff),
	} {
		f.Add(append(clientHello, options...))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		out := serveRecorded(t, in)
		// An option is answered with at most one reply for each export,
		// context and kind of information, and each of its strings once.
		if limit := 4096 + 4096*40 + 4*len(in) + 1<<20*len(in)/28; len(out) > limit {
			t.Errorf("%d bytes are answered with %d", len(in), len(out))
		}
	})
}

func FuzzTransmission(f *testing.F) {
	payload := make([]byte, 1000)
	for mode := range byte(3) {
		extended := mode == 2
		var all []byte
		for i, r := range []nbdtest.Request{
			{Type: nbdtest.CmdRead, Off: 4096, Len: 8192},
			{Type: nbdtest.CmdWrite, Flags: nbdtest.FlagFUA, Off: 100, Len: 1000, Payload: payload},
			{Type: nbdtest.CmdWrite, Flags: nbdtest.FlagPayloadLen, Off: 100, Len: 1000, Payload: payload},
			{Type: nbdtest.CmdBlockStatus, Flags: nbdtest.FlagReqOne, Len: 1 << 20},
			{Type: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagNoHole | nbdtest.FlagFastZero, Len: 1 << 19},
			{Type: nbdtest.CmdTrim, Off: 1 << 19, Len: 1 << 19},
			{Type: nbdtest.CmdRead, Flags: nbdtest.FlagDF, Len: 1 << 20},
			{Type: nbdtest.CmdCache, Len: 1},
			{Type: nbdtest.CmdFlush},
			{Type: nbdtest.CmdDisconnect},
		} {
			r.Cookie = uint64(i)
			f.Add(mode, r.Encode(extended))
			all = append(all, r.Encode(extended)...)
		}
		f.Add(mode, all)
	}
	f.Fuzz(func(t *testing.T, mode byte, in []byte) {
		hello := slices.Clone(clientHello)
		magic := uint32(0x67446698)
		switch mode % 3 {
		case 1:
			hello = append(hello, optionBytes(nbdtest.OptStructuredReply, nil)...)
			magic = 0x668e33ef
		case 2:
			hello = append(hello, optionBytes(nbdtest.OptExtendedHeaders, nil)...)
			magic = 0x6e8a278c
		}
		if mode%3 != 0 {
			hello = append(hello, optionBytes(nbdtest.OptSetMetaContext, nbdtest.ContextData("", "base:allocation", "qemu:allocation-depth"))...)
		}
		hello = append(hello, optionBytes(nbdtest.OptExportName, nil)...)
		handshake := serveRecorded(t, hello)
		out := serveRecorded(t, append(hello, in...))[len(handshake):]
		if mode%3 != 0 {
			checkChunks(t, out, magic)
		}
	})
}

// checkChunks checks that out is a sequence of whole chunks, and that data of
// an export that reads as zeroes, but for what the fuzzer wrote, is whole too.
func checkChunks(t *testing.T, out []byte, magic uint32) {
	t.Helper()
	r := bytes.NewReader(out)
	for r.Len() > 0 {
		head := make([]byte, 20)
		if magic == 0x6e8a278c {
			head = make([]byte, 32)
		}
		if _, err := io.ReadFull(r, head); err != nil {
			t.Fatalf("the replies end inside a header: %x", head)
		}
		if got := binary.BigEndian.Uint32(head); got != magic {
			t.Fatalf("chunk magic %#x: want %#x", got, magic)
		}
		length := uint64(binary.BigEndian.Uint32(head[len(head)-4:]))
		if n, _ := io.CopyN(io.Discard, r, int64(length)); uint64(n) != length {
			t.Fatalf("the replies end inside a chunk of %d bytes", length)
		}
	}
}
