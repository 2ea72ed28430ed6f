package nbdexport_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// forbidden is a backend that fails the test when it is touched before the
// transmission phase.
func forbidden(t *testing.T) *nbdtest.Memory {
	m := nbdtest.NewMemory(1 << 20)
	m.Before = func(op string, _, _ int64) error {
		t.Errorf("%s reaches the backend", op)
		return nil
	}
	return m
}

// TestHandshakeBreaches sends one breach of the handshake each. The server
// closes the connection, has not touched the backend, and serves the next
// client.
func TestHandshakeBreaches(t *testing.T) {
	greeted := func(c *nbdtest.Client) { c.Greet(3) }
	for _, tt := range []struct {
		name  string
		start func(c *nbdtest.Client)
		send  []byte
	}{
		{"unknown client flags", func(c *nbdtest.Client) { c.Read(18) }, []byte{0, 0, 0, 7}},
		{"wrong option magic", greeted, append([]byte("IHAVEOPS"), make([]byte, 8)...)},
		{"option length 0xffffffff", greeted, nbdtest.OptionHeader(nbdtest.OptGo, math.MaxUint32)},
		{"option length one above the limit", greeted, nbdtest.OptionHeader(99, 64<<10+1)},
		{"export name of 4097 bytes", greeted, append(nbdtest.OptionHeader(nbdtest.OptExportName, 4097), make([]byte, 4097)...)},
		{"request before negotiation", greeted, nbdtest.Request{Type: nbdtest.CmdRead, Len: 512}.Encode(false)},
		{"option without fixed newstyle", func(c *nbdtest.Client) { c.Greet(0) }, nbdtest.OptionHeader(nbdtest.OptList, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			// No deadline of the handshake may close in the place of the check.
			s := startServer(t, nbdexport.ServerOptions{HandshakeTimeout: time.Hour}, &nbdexport.Export{Backend: forbidden(t)})
			c := s.client()
			tt.start(c)
			c.Write(tt.send)
			// The server may close with our bytes unread, which resets the
			// connection: what it must not do is answer or stay.
			c.ExpectClosed()
			s.client().Start("", nbdtest.Structured)
		})
	}
}

func TestHandshakeTooManyOptions(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{HandshakeTimeout: time.Hour}, &nbdexport.Export{Backend: forbidden(t)})
	c := s.client()
	c.Greet(3)
	for range 32 {
		c.MustOption(nbdtest.OptList, nil, nbdtest.RepAck)
	}
	c.ExpectClosed()
	s.client().Start("", nbdtest.Simple)
}

func TestHandshakeLongNameInInfo(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: forbidden(t)}).client()
	c.Greet(3)
	for _, option := range []uint32{nbdtest.OptInfo, nbdtest.OptGo} {
		c.MustOption(option, nbdtest.InfoData(strings.Repeat("n", 4097)), nbdtest.RepErrTooBig)
		c.MustOption(option, nbdtest.InfoData(strings.Repeat("n", 4096)), nbdtest.RepErrUnknown)
	}
	c.MustOption(nbdtest.OptGo, nbdtest.InfoData(""), nbdtest.RepAck)
}

func TestHandshakeCutShort(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: forbidden(t)})
	hello := append([]byte{0, 0, 0, 3}, nbdtest.OptionHeader(nbdtest.OptGo, 6)...)
	for n := range hello {
		conn := s.dial()
		if _, err := conn.Write(hello[:n]); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	s.client().Start("", nbdtest.Simple)
}

// TestHandshakeDeadline has clients that connect and then say nothing, or stop
// in the middle.
func TestHandshakeDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &nbdexport.Export{Backend: forbidden(t)}
		silent, halfway := pipeClient(t, e), pipeClient(t, e)
		halfway.Greet(3)
		halfway.Write([]byte("IHAVE"))
		silent.Read(18)
		silent.ExpectClosed()
		halfway.ExpectClosed()
	})
}

// pipeClient returns a client of a server with defaults, both in the bubble of the
// test: no deadline passes while one of them has something to do.
func pipeClient(t *testing.T, e *nbdexport.Export) *nbdtest.Client {
	t.Helper()
	server, client := net.Pipe()
	s := nbdexport.NewServer(nbdexport.ServerOptions{})
	if err := s.AddExport(e); err != nil {
		t.Fatal(err)
	}
	go s.ServeConn(t.Context(), server) // ends with the connection, or the test
	return nbdtest.NewClient(t, client)
}

// TestHandshakeDeadlineEnds checks that the deadline does not end the
// transmission phase.
func TestHandshakeDeadlineEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := pipeClient(t, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
		c.Start("", nbdtest.Simple)
		time.Sleep(time.Minute) // in the bubble of the test
		if r := read(c, 0, 512); r.Err != 0 {
			t.Error(r.Err)
		}
	})
}

func TestMaxConnections(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{MaxConnections: 2}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
	a, b := s.client(), s.client()
	a.Start("", nbdtest.Simple)
	b.Start("", nbdtest.Simple)
	third := s.client() // waits in the backlog
	third.Conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := third.Conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("third client: %d bytes, %v: want it to wait", n, err)
	}
	a.Conn.Close()
	third.Start("", nbdtest.Simple)
}

// TestSingleConnectionIsNotCalledMulti checks that a client is not invited to
// open connections that would wait for its own first one.
func TestSingleConnectionIsNotCalledMulti(t *testing.T) {
	for n, want := range map[int]bool{1: false, 2: true, -1: true} {
		s := startServer(t, nbdexport.ServerOptions{MaxConnections: n}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
		_, flags := s.client().Start("", nbdtest.Structured)
		if got := flags&(1<<8) != 0; got != want {
			t.Errorf("at most %d connections: CAN_MULTI_CONN %v: want %v", n, got, want)
		}
	}
}

func TestManyIdleClientsDoNotStopOthers(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{MaxConnections: -1, HandshakeTimeout: time.Minute}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
	for range 200 {
		s.client()
	}
	c := s.client()
	c.Start("", nbdtest.Simple)
	for range 100 {
		if r := read(c, 0, 4096); r.Err != 0 {
			t.Fatal(r.Err)
		}
	}
}

// TestRefusedRequests sends requests that the server must refuse, each with an
// error for this request only: a good one follows on the same connection.
func TestRefusedRequests(t *testing.T) {
	const size = 1 << 20
	forModes(t, size, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		m.Before = func(op string, off, n int64) error {
			if op != "read" || off != 0 || n != 512 {
				t.Errorf("%s of %d at %#x reaches the backend", op, n, off)
			}
			return nil
		}
		payload := make([]byte, 512)
		for _, tt := range []struct {
			name string
			r    nbdtest.Request
			want syscall.Errno
		}{
			{"unknown command", nbdtest.Request{Type: 99}, syscall.EINVAL},
			{"resize", nbdtest.Request{Type: 8, Len: 512}, syscall.EINVAL},
			{"unknown flag", nbdtest.Request{Type: nbdtest.CmdRead, Flags: 1 << 15, Len: 512}, syscall.EINVAL},
			{"flag of another command", nbdtest.Request{Type: nbdtest.CmdRead, Flags: nbdtest.FlagNoHole, Len: 512}, syscall.EINVAL},
			{"unknown flag of a write", nbdtest.Request{Type: nbdtest.CmdWrite, Flags: 1 << 14, Len: 512, Payload: payload}, syscall.EINVAL},
			{"unknown flag of a flush", nbdtest.Request{Type: nbdtest.CmdFlush, Flags: 1 << 14}, syscall.EINVAL},
			{"read beyond the end", nbdtest.Request{Type: nbdtest.CmdRead, Off: size - 511, Len: 512}, syscall.EINVAL},
			{"read at the end", nbdtest.Request{Type: nbdtest.CmdRead, Off: size, Len: 1}, syscall.EINVAL},
			{"read at the end of the numbers", nbdtest.Request{Type: nbdtest.CmdRead, Off: math.MaxUint64, Len: 512}, syscall.EINVAL},
			{"range that overflows", nbdtest.Request{Type: nbdtest.CmdRead, Off: math.MaxUint64 - 511, Len: 512}, syscall.EINVAL},
			{"range that overflows a signed number", nbdtest.Request{Type: nbdtest.CmdTrim, Off: math.MaxInt64, Len: 512}, syscall.EINVAL},
			{"write beyond the end", nbdtest.Request{Type: nbdtest.CmdWrite, Off: size - 511, Len: 512, Payload: payload}, syscall.ENOSPC},
			{"long write beyond the end", nbdtest.Request{Type: nbdtest.CmdWrite, Len: 3 << 20, Payload: make([]byte, 3<<20)}, syscall.ENOSPC},
			{"write at an offset that overflows", nbdtest.Request{Type: nbdtest.CmdWrite, Off: math.MaxUint64 - 5, Len: 512, Payload: payload}, syscall.ENOSPC},
			{"zeroes beyond the end", nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Len: size + 1}, syscall.ENOSPC},
			{"trim beyond the end", nbdtest.Request{Type: nbdtest.CmdTrim, Off: 1, Len: size}, syscall.EINVAL},
			{"cache beyond the end", nbdtest.Request{Type: nbdtest.CmdCache, Off: 1, Len: size}, syscall.EINVAL},
			{"longest trim", nbdtest.Request{Type: nbdtest.CmdTrim, Len: math.MaxUint32}, syscall.EINVAL},
			{"read of more than 32 MiB", nbdtest.Request{Type: nbdtest.CmdRead, Len: 32<<20 + 1}, syscall.EINVAL},
			{"longest read", nbdtest.Request{Type: nbdtest.CmdRead, Len: math.MaxUint32}, syscall.EINVAL},
		} {
			t.Run(tt.name, func(t *testing.T) {
				tt.r.Cookie = 77
				if c.Extended && tt.r.Type == nbdtest.CmdWrite {
					tt.r.Flags |= nbdtest.FlagPayloadLen
				}
				if got := c.Do(tt.r); got.Err != tt.want {
					t.Errorf("got %v %s: want %v", got.Err, got.Text, tt.want)
				}
				if r := read(c, 0, 512); r.Err != 0 {
					t.Fatalf("the next request: %v", r.Err)
				}
			})
		}
	})
}

// TestExtendedLengths sends what only extended headers can say.
func TestExtendedLengths(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)}).client()
	c.Start("", nbdtest.Extended, "base:allocation")
	for _, r := range []nbdtest.Request{
		{Type: nbdtest.CmdTrim, Len: math.MaxUint64},
		{Type: nbdtest.CmdBlockStatus, Len: math.MaxUint64},
		{Type: nbdtest.CmdBlockStatus, Off: 1, Len: math.MaxUint64},
		{Type: nbdtest.CmdCache, Off: 1 << 63, Len: 1 << 63},
		{Type: nbdtest.CmdRead, Len: 1 << 33},
		// A payload where none belongs is dropped with its request.
		{Type: nbdtest.CmdTrim, Flags: nbdtest.FlagPayloadLen, Len: 512, Payload: make([]byte, 512)},
		{Type: nbdtest.CmdRead, Flags: nbdtest.FlagPayloadLen, Len: 512, Payload: make([]byte, 512)},
		{Type: 99, Flags: nbdtest.FlagPayloadLen, Len: 3, Payload: make([]byte, 3)},
	} {
		if reply := c.Do(r); reply.Err != syscall.EINVAL {
			t.Errorf("%d, %#x bytes: %v: want EINVAL", r.Type, r.Len, reply.Err)
		}
	}
	if r := read(c, 0, 512); r.Err != 0 {
		t.Error(r.Err)
	}
}

// TestTransmissionBreaches sends what leaves no common position in the stream:
// the server closes the connection.
func TestTransmissionBreaches(t *testing.T) {
	for _, tt := range []struct {
		name string
		send func(c *nbdtest.Client) []byte
	}{
		{"wrong magic", func(c *nbdtest.Client) []byte {
			b := nbdtest.Request{Type: nbdtest.CmdFlush}.Encode(c.Extended)
			b[0] ^= 0xff
			return b
		}},
		{"write of more than 32 MiB", func(c *nbdtest.Client) []byte {
			return nbdtest.Request{Type: nbdtest.CmdWrite, Len: 32<<20 + 1}.Encode(c.Extended)
		}},
		{"longest write", func(c *nbdtest.Client) []byte {
			return nbdtest.Request{Type: nbdtest.CmdWrite, Flags: nbdtest.FlagPayloadLen, Len: math.MaxUint64}.Encode(c.Extended)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			forModes(t, 64<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
				m.Before = forbidden(t).Before
				c.Write(tt.send(c))
				c.ExpectClosed()
			})
		})
	}
}

// TestCutRequests closes the connection after each part of a write, which must
// not be performed.
func TestCutRequests(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: forbidden(t)})
	for _, n := range []int{1, 27, 28, 29, 28 + 4095} {
		c := s.client()
		c.Start("", nbdtest.Simple)
		r := nbdtest.Request{Type: nbdtest.CmdWrite, Len: 4096, Payload: make([]byte, 4096)}
		c.Write(r.Encode(false)[:n])
		c.Conn.Close()
	}
}

// TestHalfClose shuts down the sending side: what was sent is answered still.
func TestHalfClose(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, _ *nbdtest.Memory) {
		for i := range uint64(20) {
			c.Send(nbdtest.Request{Type: nbdtest.CmdRead, Cookie: i, Off: i * 4096, Len: 4096})
			c.Send(nbdtest.Request{Type: nbdtest.CmdFlush, Cookie: i + 100})
		}
		if err := c.Conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		for answered := 0; answered < 40; {
			if c.Receive().Done {
				answered++
			}
		}
		c.ExpectClosed()
	})
}

func TestByteByByteSender(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, _ *nbdtest.Memory) {
		p := randomBytes(9, 300)
		w := nbdtest.Request{Type: nbdtest.CmdWrite, Cookie: 1, Off: 1000, Len: 300, Payload: p}
		if c.Extended {
			w.Flags = nbdtest.FlagPayloadLen
		}
		for _, b := range w.Encode(c.Extended) {
			c.Write([]byte{b})
		}
		if r := c.Collect(w); r.Err != 0 {
			t.Fatal(r.Err)
		}
		if r := read(c, 1000, 300); !bytes.Equal(r.Data, p) {
			t.Error("content differs")
		}
	})
}

// TestDuplicateCookies has two requests with one cookie under way: each is
// answered.
func TestDuplicateCookies(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)}).client()
	c.Start("", nbdtest.Structured)
	r := nbdtest.Request{Type: nbdtest.CmdRead, Cookie: 5, Len: 4096}
	c.Write(append(r.Encode(false), r.Encode(false)...))
	for range 2 {
		if m := c.Receive(); m.Cookie != 5 || !m.Done || len(m.Data) != 4096 {
			t.Errorf("got %+v", m)
		}
	}
}

// TestBlockStatusIsCapped asks for more extents than one reply may hold, and
// for more than the server looks at.
func TestBlockStatusIsCapped(t *testing.T) {
	const size = 64 << 20
	m := nbdtest.NewMemory(size)
	for off := int64(0); off < size; off += 8192 {
		m.WriteAt([]byte{1}, off) // data, hole, data, …
	}
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
	c.Start("", nbdtest.Structured, "base:allocation")
	r := c.Do(nbdtest.Request{Type: nbdtest.CmdBlockStatus, Len: size})
	if got := len(r.Extents[1]); r.Err != 0 || got != 4096 {
		t.Errorf("%d extents, %v: want 4096", got, r.Err)
	}
}

// endless is a backend of huge size and tiny extents of one state.
type endless struct{ *nbdtest.Memory }

func (endless) Size() int64 { return math.MaxInt64 }

func (b endless) BlockStatus(_ context.Context, off, n int64) (nbdexport.Extent, error) {
	return nbdexport.Extent{Len: min(n, 512), Hole: true, Zero: true}, b.Before("status", off, n)
}

func TestBlockStatusWorkIsBounded(t *testing.T) {
	m := nbdtest.NewMemory(512)
	var calls atomic.Int64
	m.Before = func(string, int64, int64) error { calls.Add(1); return nil }
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: endless{m}}).client()
	c.Start("", nbdtest.Extended, "base:allocation")
	r := c.Do(nbdtest.Request{Type: nbdtest.CmdBlockStatus, Len: math.MaxInt64})
	if r.Err != 0 || len(r.Extents[1]) != 1 || calls.Load() > 64<<10 {
		t.Errorf("%v, extents %v, %d calls: want one extent after 64 Ki calls", r.Err, r.Extents, calls.Load())
	}
}

// whole is a backend of huge size and one extent.
type whole struct{ *nbdtest.Memory }

func (whole) Size() int64 { return 1 << 50 }

func (whole) BlockStatus(_ context.Context, _, n int64) (nbdexport.Extent, error) {
	return nbdexport.Extent{Len: n, Depth: 1}, nil
}

// TestBlockStatusLengths checks lengths beyond 32 bits: they are told in full
// by extended headers, and never cut to a wrong number without them.
func TestBlockStatusLengths(t *testing.T) {
	for _, tt := range []struct {
		mode nbdtest.Mode
		ask  uint64
		want uint64
	}{
		{nbdtest.Structured, math.MaxUint32, math.MaxUint32 &^ (64<<10 - 1)},
		{nbdtest.Extended, 1 << 49, 1 << 49},
	} {
		c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: whole{nbdtest.NewMemory(512)}}).client()
		c.Start("", tt.mode, "base:allocation")
		r := c.Do(nbdtest.Request{Type: nbdtest.CmdBlockStatus, Flags: nbdtest.FlagReqOne, Off: 4096, Len: tt.ask})
		if want := fmt.Sprint([]nbdtest.Extent{{Len: tt.want}}); fmt.Sprint(r.Extents[1]) != want {
			t.Errorf("%s: got %v: want %v", tt.mode, r.Extents, want)
		}
	}
}

// fullPipe makes the client of c send reads of n bytes and read no reply, until
// the server accepts no more.
func fullPipe(t *testing.T, c *nbdtest.Client, n uint64) (sent int) {
	r := nbdtest.Request{Type: nbdtest.CmdRead, Len: n}.Encode(c.Extended)
	batch := bytes.Repeat(r, 64)
	for {
		c.Conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		k, err := c.Conn.Write(batch)
		sent += k / len(r)
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.ErrClosedPipe) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) {
				t.Fatal(err)
			}
			return sent
		}
	}
}

// TestSlowReadersHoldBoundedMemory has clients that ask for much and read
// nothing. The server stops taking their requests, its memory stays within the
// budgets of the connections, and others are served.
func TestSlowReadersHoldBoundedMemory(t *testing.T) {
	const clients, budget = 8, 16 << 20
	m := nbdtest.NewMemory(64 << 20)
	m.WriteAt(make([]byte, 64<<20), 0) // holes would take no memory in replies
	s := startServer(t, nbdexport.ServerOptions{MaxConnections: -1}, &nbdexport.Export{Backend: m})
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var done sync.WaitGroup
	for i := range clients {
		c := s.client()
		c.Start("", nbdtest.Modes[i%len(nbdtest.Modes)])
		done.Go(func() { fullPipe(t, c, 2<<20) })
	}
	done.Wait()
	runtime.GC() // twice: what a pool holds survives once
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown, limit := int64(after.HeapInuse)-int64(before.HeapInuse), int64(clients*(budget+4<<20)); grown > limit {
		t.Errorf("heap has grown by %d bytes: want at most %d", grown, limit)
	}
	c := s.client()
	c.Start("", nbdtest.Simple)
	if r := read(c, 0, 1<<20); r.Err != 0 {
		t.Error(r.Err)
	}
}

// TestSlowReaderOfSmallReplies floods the server with requests whose replies
// are headers only.
func TestSlowReaderOfSmallReplies(t *testing.T) {
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)}).client()
	c.Start("", nbdtest.Structured)
	var sent int
	bad := bytes.Repeat(nbdtest.Request{Type: 99}.Encode(false), 1024)
	for sent < 1<<20 {
		c.Conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Conn.Write(bad)
		sent += n / 28
		if err != nil {
			return // the server has stopped taking them
		}
	}
	t.Errorf("the server has taken %d requests whose replies nobody reads", sent)
}

// TestWriteTimeout checks that a client that never reads is dropped.
func TestWriteTimeout(t *testing.T) {
	ended := make(chan bool, 1)
	s := startServer(t, nbdexport.ServerOptions{
		WriteTimeout:    100 * time.Millisecond,
		ConnectionEnded: func(negotiated bool, _ int) { ended <- negotiated },
	}, &nbdexport.Export{Backend: nbdtest.NewMemory(64 << 20)})
	c := s.client()
	c.Start("", nbdtest.Structured)
	requests := bytes.Repeat(nbdtest.Request{Type: nbdtest.CmdRead, Len: 1 << 20}.Encode(c.Extended), 64)
	var writing sync.WaitGroup
	writing.Go(func() { // ends with the connection; until then it does not take a pause of the server for a full pipe
		for err := error(nil); err == nil; {
			_, err = c.Conn.Write(requests)
		}
	})
	select {
	case <-ended:
	case <-time.After(2 * time.Minute):
		t.Error("the connection lives on")
	}
	c.Conn.Close()
	writing.Wait()
}

// TestStopAnswersWhatWasRead ends the server while a request is under way.
func TestStopAnswersWhatWasRead(t *testing.T) {
	m := nbdtest.NewMemory(1 << 20)
	entered, gate := make(chan struct{}), make(chan struct{})
	m.Before = func(op string, _, _ int64) error {
		if op == "flush" {
			close(entered)
			<-gate
		}
		return nil
	}
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m})
	c := s.client()
	c.Start("", nbdtest.Simple)
	c.Send(nbdtest.Request{Type: nbdtest.CmdFlush, Cookie: 4})
	<-entered
	s.stop()
	close(gate)
	if msg := c.Receive(); msg.Cookie != 4 || msg.Err != 0 {
		t.Errorf("got %+v", msg)
	}
	c.ExpectClosed()
	s.wait()
}

// TestUnanswered: changes that the backend leaves have no reply, however they are made.
func TestUnanswered(t *testing.T) {
	const own = 8 << 20 // from where on all is as usual
	m := nbdtest.NewMemory(2 * own)
	m.Before = func(op string, off, _ int64) error {
		if (op == "write" || op == "zero") && off < own {
			return nbdexport.ErrUnanswered
		}
		return nil
	}
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m})
	c := s.client()
	c.Start("", nbdtest.Structured)
	for _, n := range []uint64{512, 40 << 10, 1 << 20, 4 << 20} {
		for _, flags := range []uint16{0, nbdtest.FlagFUA} {
			c.Send(nbdtest.Request{Type: nbdtest.CmdWrite, Flags: flags, Cookie: 1, Len: n, Payload: make([]byte, n)})
			c.Send(nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Flags: flags, Cookie: 1, Len: n})
			if r := write(c, flags, own, make([]byte, n)); r.Err != 0 {
				t.Errorf("write of %d bytes beside it: %v %s", n, r.Err, r.Text)
			}
		}
	}
	s.stop()
	c.ExpectClosed()
	s.wait()
}

// TestClientGoesWhileRequestsAreUnderWay closes connections at all moments.
func TestClientGoesWhileRequestsAreUnderWay(t *testing.T) {
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: nbdtest.NewMemory(16 << 20)})
	var all []byte
	for i := range uint64(100) {
		all = append(all, nbdtest.Request{Type: nbdtest.CmdRead, Cookie: i, Off: i * 4096, Len: 64 << 10}.Encode(false)...)
		all = append(all, nbdtest.Request{Type: nbdtest.CmdWrite, Cookie: i, Off: i * 4096, Len: 4096, Payload: make([]byte, 4096)}.Encode(false)...)
	}
	for n := 0; n < len(all); n += len(all)/40 + 1 {
		c := s.client()
		c.Start("", nbdtest.Structured)
		c.Write(all[:n])
		c.Conn.Close()
	}
	c := s.client()
	c.Start("", nbdtest.Simple)
	if r := read(c, 0, 512); r.Err != 0 {
		t.Error(r.Err)
	}
}

func TestConnectionEnded(t *testing.T) {
	type end struct {
		negotiated bool
		left       int
	}
	ends := make(chan end, 8)
	s := startServer(t, nbdexport.ServerOptions{
		ConnectionEnded: func(negotiated bool, left int) { ends <- end{negotiated, left} },
	}, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
	a, b, d := s.client(), s.client(), s.client()
	a.Start("", nbdtest.Simple)
	b.Start("", nbdtest.Simple)
	d.Greet(3)
	for i, tt := range []struct {
		c    *nbdtest.Client
		want end
	}{{a, end{true, 2}}, {d, end{false, 1}}, {b, end{true, 0}}} {
		tt.c.Conn.Close()
		if got := <-ends; got != tt.want {
			t.Errorf("end %d: got %+v: want %+v", i, got, tt.want)
		}
	}
}

func TestAddExport(t *testing.T) {
	s := nbdexport.NewServer(nbdexport.ServerOptions{})
	e := &nbdexport.Export{Name: "x", Backend: nbdtest.NewMemory(512)}
	if err := s.AddExport(e); err != nil {
		t.Fatal(err)
	}
	if err := s.AddExport(e); !errors.Is(err, nbdexport.ErrExportExists) {
		t.Errorf("second export of a name: %v: want ErrExportExists", err)
	}
	s.RemoveExport("x")
	if err := s.AddExport(e); err != nil {
		t.Errorf("after removal: %v", err)
	}
	if err := s.AddExport(&nbdexport.Export{Name: strings.Repeat("n", 4097), Backend: e.Backend}); err == nil {
		t.Error("a name of 4097 bytes is accepted")
	}
}
