package nbdexport_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// forModes runs a test with a connected client in each form of replies.
func forModes(t *testing.T, size int64, test func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory)) {
	for _, mode := range nbdtest.Modes {
		t.Run(string(mode), func(t *testing.T) {
			m := nbdtest.NewMemory(size)
			c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
			var contexts []string
			if mode != nbdtest.Simple {
				contexts = []string{"base:allocation", "qemu:allocation-depth"}
			}
			c.Start("", mode, contexts...)
			test(t, c, m)
		})
	}
}

func write(c *nbdtest.Client, flags uint16, off uint64, p []byte) nbdtest.Reply {
	if c.Extended {
		flags |= nbdtest.FlagPayloadLen
	}
	return c.Do(nbdtest.Request{Type: nbdtest.CmdWrite, Flags: flags, Cookie: off + 1, Off: off, Len: uint64(len(p)), Payload: p})
}

func read(c *nbdtest.Client, off, n uint64) nbdtest.Reply {
	return c.Do(nbdtest.Request{Type: nbdtest.CmdRead, Cookie: off + 2, Off: off, Len: n})
}

func randomBytes(seed uint64, n int) []byte {
	var key [32]byte
	binary.BigEndian.PutUint64(key[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b) // never fails
	return b
}

func TestReadWhatWasWritten(t *testing.T) {
	forModes(t, 80<<20, func(t *testing.T, c *nbdtest.Client, _ *nbdtest.Memory) {
		for i, tt := range []struct{ off, n uint64 }{
			{0, 1}, {1, 511}, {4095, 2}, {0, 4096}, {4096, 32 << 10}, {5, 32<<10 + 1}, {100, 64 << 10},
			{1 << 20, 1 << 20}, {1<<20 + 7, 2 << 20}, {3<<20 + 1, 2<<20 + 1}, {12345, 32 << 20}, {48 << 20, 32 << 20},
			{80<<20 - 1, 1}, {0, 0}, {80 << 20, 0},
		} {
			p := randomBytes(uint64(i), int(tt.n))
			if r := write(c, 0, tt.off, p); r.Err != 0 {
				t.Fatalf("write of %d at %#x: %v %s", tt.n, tt.off, r.Err, r.Text)
			}
			r := read(c, tt.off, tt.n)
			if r.Err != 0 || !bytes.Equal(r.Data, p) {
				t.Fatalf("read of %d at %#x: %v %s, or other data", tt.n, tt.off, r.Err, r.Text)
			}
		}
	})
}

// TestPipelined has many requests under way and takes their replies in any
// order.
func TestPipelined(t *testing.T) {
	forModes(t, 16<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		image := randomBytes(1, 16<<20)
		m.WriteAt(image, 0)
		rng := rand.New(rand.NewPCG(2, 0))
		want := map[uint64]nbdtest.Request{}
		got := map[uint64][]byte{}
		var stream []byte
		for cookie := range uint64(300) {
			n := []uint64{512, 4096, 16 << 10, 128 << 10}[rng.IntN(4)]
			r := nbdtest.Request{Type: nbdtest.CmdRead, Cookie: cookie<<32 | 7, Off: rng.Uint64N(16<<20 - n), Len: n}
			want[r.Cookie] = r
			got[r.Cookie] = make([]byte, n)
			c.Expect(r)
			stream = append(stream, r.Encode(c.Extended)...)
		}
		go c.Conn.Write(stream) // ends when the server has read it all, or with the connection
		for len(want) > 0 {
			msg := c.Receive()
			r, ok := want[msg.Cookie]
			if !ok || msg.Err != 0 {
				t.Fatalf("cookie %#x, error %v", msg.Cookie, msg.Err)
			}
			at := uint64(0)
			if c.Structured {
				at = msg.Off - r.Off
			}
			copy(got[msg.Cookie][at:], msg.Data)
			if msg.Done {
				if !bytes.Equal(got[msg.Cookie], image[r.Off:r.Off+r.Len]) {
					t.Fatalf("read of %d at %#x: other data", r.Len, r.Off)
				}
				delete(want, msg.Cookie)
			}
		}
	})
}

func TestWriteZeroesAndTrim(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		image := randomBytes(3, 1<<20)
		write(c, 0, 0, image)
		for _, r := range []nbdtest.Request{
			{Type: nbdtest.CmdWriteZeroes, Off: 100, Len: 9000},
			{Type: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagNoHole, Off: 32 << 10, Len: 8 << 10},
			{Type: nbdtest.CmdTrim, Off: 64 << 10, Len: 16 << 10},
			{Type: nbdtest.CmdTrim, Off: 5, Len: 0},
			{Type: nbdtest.CmdWriteZeroes, Off: 1 << 20, Len: 0},
		} {
			if reply := c.Do(r); reply.Err != 0 {
				t.Errorf("%+v: %v %s", r, reply.Err, reply.Text)
			}
			clear(image[r.Off : r.Off+r.Len])
		}
		if r := read(c, 0, 1<<20); !bytes.Equal(r.Data, image) {
			t.Error("content differs")
		}
		e, err := m.BlockStatus(t.Context(), 32<<10, 8<<10)
		if err != nil || e.Hole {
			t.Errorf("NO_HOLE made a hole: %+v, %v", e, err)
		}
		e, err = m.BlockStatus(t.Context(), 64<<10, 16<<10)
		if err != nil || !e.Hole || e.Len != 16<<10 {
			t.Errorf("trim made no hole: %+v, %v", e, err)
		}
	})
}

// TestFastZeroOfASlowBackend checks that a backend that cannot tell is taken
// for slow.
func TestFastZeroOfASlowBackend(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, _ *nbdtest.Memory) {
		r := c.Do(nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFastZero, Len: 4096})
		if r.Err != syscall.ENOTSUP {
			t.Errorf("got %v: want ENOTSUP", r.Err)
		}
	})
}

type fastMemory struct{ *nbdtest.Memory }

func (m fastMemory) WriteZeroesFast(off, n int64, unmap bool) error {
	return m.WriteZeroes(off, n, unmap)
}

func TestFastZeroOfAFastBackend(t *testing.T) {
	m := fastMemory{nbdtest.NewMemory(1 << 20)}
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
	c.Start("", nbdtest.Structured)
	if r := c.Do(nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFastZero, Len: 4096}); r.Err != 0 {
		t.Errorf("got %v: want success", r.Err)
	}
}

func TestFUAIsDurable(t *testing.T) {
	forModes(t, 8<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		for _, n := range []int{1, 4096, 1 << 20, 5 << 20} {
			p := randomBytes(uint64(n), n)
			write(c, nbdtest.FlagFUA, 4096, p)
			if !bytes.Equal(m.Durable(4096, int64(n)), p) {
				t.Errorf("a FUA write of %d bytes is not durable", n)
			}
		}
		write(c, 0, 0, []byte{1})
		if m.Durable(0, 1)[0] != 0 {
			t.Error("a write without FUA was flushed: this test sees nothing")
		}
		c.Do(nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Flags: nbdtest.FlagFUA, Off: 4096, Len: 4096})
		if !bytes.Equal(m.Durable(4096, 4096), make([]byte, 4096)) {
			t.Error("a FUA write of zeroes is not durable")
		}
	})
}

// TestFlushCoversOtherConnections checks what CAN_MULTI_CONN promises: a FLUSH
// on one connection covers what another one has been told is written.
func TestFlushCoversOtherConnections(t *testing.T) {
	m := nbdtest.NewMemory(1 << 20)
	s := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m})
	a, b := s.client(), s.client()
	a.Start("", nbdtest.Simple)
	_, flags := b.Start("", nbdtest.Extended)
	if flags&(1<<8) == 0 {
		t.Fatal("CAN_MULTI_CONN is not announced")
	}
	for i := range 100 {
		p := randomBytes(uint64(i), 4096)
		write(a, 0, 8192, p)
		if r := read(b, 8192, 4096); !bytes.Equal(r.Data, p) {
			t.Fatal("a write on one connection is not seen on another")
		}
		if r := b.Do(nbdtest.Request{Type: nbdtest.CmdFlush, Cookie: 1}); r.Err != 0 {
			t.Fatal(r.Err)
		}
		if !bytes.Equal(m.Durable(8192, 4096), p) {
			t.Fatal("flush on one connection does not cover a write on another")
		}
	}
}

func TestCacheSucceeds(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, _ *nbdtest.Memory) {
		if r := c.Do(nbdtest.Request{Type: nbdtest.CmdCache, Len: 1 << 20}); r.Err != 0 {
			t.Errorf("cache: %v", r.Err)
		}
	})
}

func TestSparseRead(t *testing.T) {
	forModes(t, 8<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		image := make([]byte, 8<<20)
		copy(image[1<<20:], randomBytes(4, 64<<10))
		m.WriteAt(image[1<<20:1<<20+64<<10], 1<<20)
		for _, flags := range []uint16{0, nbdtest.FlagDF} {
			if flags != 0 && !c.Structured {
				continue
			}
			r := c.Do(nbdtest.Request{Type: nbdtest.CmdRead, Flags: flags, Off: 512 << 10, Len: 1 << 20})
			if r.Err != 0 || !bytes.Equal(r.Data, image[512<<10:512<<10+1<<20]) {
				t.Fatalf("flags %d: %v, or other data", flags, r.Err)
			}
			switch {
			case c.Structured && flags == 0 && (r.Chunks != 3 || r.Holes != 2):
				t.Errorf("%d chunks, %d holes: want 3, 2", r.Chunks, r.Holes)
			case flags != 0 && (r.Chunks != 1 || r.Holes != 0):
				t.Errorf("with DF: %d chunks, %d holes: want 1, 0", r.Chunks, r.Holes)
			}
		}
		if c.Structured {
			r := c.Do(nbdtest.Request{Type: nbdtest.CmdRead, Flags: nbdtest.FlagDF, Len: 4 << 20})
			if r.Err != syscall.EOVERFLOW {
				t.Errorf("long read with DF: %v: want EOVERFLOW", r.Err)
			}
			if r := read(c, 2<<20, 6<<20); r.Err != 0 || r.Holes != 1 || r.Chunks != 1 {
				t.Errorf("read of a hole: %+v", r)
			}
		}
	})
}

func TestBlockStatus(t *testing.T) {
	for _, mode := range []nbdtest.Mode{nbdtest.Structured, nbdtest.Extended} {
		t.Run(string(mode), func(t *testing.T) {
			m := nbdtest.NewMemory(1 << 20)
			m.WriteAt(make([]byte, 8192), 4096)
			c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
			c.Start("", mode, "base:allocation", "qemu:allocation-depth")
			for _, tt := range []struct {
				r    nbdtest.Request
				want string
			}{
				{nbdtest.Request{Len: 1 << 20}, "map[1:[{4096 3} {8192 0} {1036288 3}] 2:[{4096 0} {8192 1} {1036288 0}]]"},
				{nbdtest.Request{Off: 5000, Len: 100}, "map[1:[{100 0}] 2:[{100 1}]]"},
				{nbdtest.Request{Flags: nbdtest.FlagReqOne, Len: 1 << 20}, "map[1:[{4096 3}] 2:[{4096 0}]]"},
				{nbdtest.Request{Off: 1<<20 - 1, Len: 1}, "map[1:[{1 3}] 2:[{1 0}]]"},
			} {
				tt.r.Type = nbdtest.CmdBlockStatus
				reply := c.Do(tt.r)
				if got := fmt.Sprint(reply.Extents); reply.Err != 0 || got != tt.want {
					t.Errorf("%+v: %v %s\ngot  %s\nwant %s", tt.r, reply.Err, reply.Text, got, tt.want)
				}
			}
			for _, n := range []uint64{0, 1<<20 + 1} {
				if r := c.Do(nbdtest.Request{Type: nbdtest.CmdBlockStatus, Len: n}); r.Err != syscall.EINVAL {
					t.Errorf("block status of %d bytes: %v: want EINVAL", n, r.Err)
				}
			}
		})
	}
}

// TestBackendErrors checks that an error reaches the request that caused it,
// and only that.
func TestErrorsReachTheirRequest(t *testing.T) {
	forModes(t, 8<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		fail := map[string]error{
			"read":    syscall.EIO,
			"write":   fmt.Errorf("image full: %w", syscall.ENOSPC),
			"zero":    syscall.EROFS,
			"discard": errors.New("without a number"),
			"flush":   syscall.ENOMEM,
			"status":  syscall.EINVAL,
		}
		var broken atomic.Bool
		m.Before = func(op string, _, _ int64) error {
			if broken.Load() {
				return fail[op]
			}
			return nil
		}
		broken.Store(true)
		for _, tt := range []struct {
			r    nbdtest.Request
			want syscall.Errno
		}{
			{nbdtest.Request{Type: nbdtest.CmdRead, Len: 4096}, syscall.EIO},
			{nbdtest.Request{Type: nbdtest.CmdRead, Len: 100 << 10}, syscall.EIO},
			{nbdtest.Request{Type: nbdtest.CmdRead, Len: 5 << 20}, syscall.EIO},
			{nbdtest.Request{Type: nbdtest.CmdWrite, Len: 3, Payload: []byte("abc")}, syscall.ENOSPC},
			{nbdtest.Request{Type: nbdtest.CmdWrite, Len: 100 << 10, Payload: make([]byte, 100<<10)}, syscall.ENOSPC},
			{nbdtest.Request{Type: nbdtest.CmdWrite, Len: 5 << 20, Payload: make([]byte, 5<<20)}, syscall.ENOSPC},
			{nbdtest.Request{Type: nbdtest.CmdWriteZeroes, Len: 512}, syscall.EPERM},
			{nbdtest.Request{Type: nbdtest.CmdTrim, Len: 512}, syscall.EIO},
			{nbdtest.Request{Type: nbdtest.CmdFlush}, syscall.ENOMEM},
			{nbdtest.Request{Type: nbdtest.CmdBlockStatus, Len: 512}, syscall.EINVAL},
		} {
			if tt.r.Type == nbdtest.CmdRead && c.Structured && tt.r.Len >= 64<<10 {
				tt.want = syscall.EINVAL // block status is asked first
			}
			if r := c.Do(tt.r); r.Err != tt.want {
				t.Errorf("type %d, %d bytes: %v %s: want %v", tt.r.Type, tt.r.Len, r.Err, r.Text, tt.want)
			}
		}
		broken.Store(false)
		if r := read(c, 0, 4096); r.Err != 0 {
			t.Errorf("read after the errors: %v", r.Err)
		}
	})
}

// TestErrorInsideALongRead checks that a read that fails after its first piece
// is not taken for a success.
func TestErrorInsideALongRead(t *testing.T) {
	forModes(t, 16<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		m.WriteAt(randomBytes(5, 16<<20), 0)
		m.Before = func(op string, off, _ int64) error {
			if op == "read" && off >= 4<<20 {
				return syscall.EIO
			}
			return nil
		}
		r := nbdtest.Request{Type: nbdtest.CmdRead, Len: 16 << 20}
		if !c.Structured {
			c.Write(r.Encode(false))
			c.Read(16 + 4<<20) // says success, and cannot take it back
			c.ExpectClosed()
			return
		}
		if reply := c.Do(r); reply.Err != syscall.EIO {
			t.Errorf("got %v: want EIO", reply.Err)
		}
	})
}

// TestErrorInsideALongWrite checks that a piece that is written does not make up
// for one that is not.
func TestErrorInsideALongWrite(t *testing.T) {
	forModes(t, 8<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		m.Before = func(op string, off, _ int64) error {
			if op == "write" && off == 2<<20 {
				return syscall.ENOSPC
			}
			return nil
		}
		if r := write(c, 0, 0, make([]byte, 7<<20)); r.Err != syscall.ENOSPC {
			t.Errorf("got %v: want ENOSPC", r.Err)
		}
	})
}

func TestReadOnlyRefusesChanges(t *testing.T) {
	m := nbdtest.NewMemory(1 << 20)
	m.Before = func(op string, _, _ int64) error {
		if op != "read" && op != "flush" && op != "status" {
			t.Errorf("%s reaches the backend", op)
		}
		return nil
	}
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m, ReadOnly: true}).client()
	c.Start("", nbdtest.Structured)
	for _, r := range []nbdtest.Request{
		{Type: nbdtest.CmdWrite, Len: 4096, Payload: make([]byte, 4096)},
		{Type: nbdtest.CmdWrite, Len: 4 << 20, Payload: make([]byte, 4<<20)}, // beyond the end as well
		{Type: nbdtest.CmdWriteZeroes, Len: 4096},
		{Type: nbdtest.CmdTrim, Len: 4096},
	} {
		if reply := c.Do(r); reply.Err != syscall.EPERM && reply.Err != syscall.ENOSPC {
			t.Errorf("type %d: %v: want EPERM", r.Type, reply.Err)
		}
	}
	if r := read(c, 0, 4096); r.Err != 0 {
		t.Error(r.Err)
	}
	if r := c.Do(nbdtest.Request{Type: nbdtest.CmdFlush}); r.Err != 0 {
		t.Error(r.Err)
	}
}

func TestServeTransmission(t *testing.T) {
	verifyNoLeaks(t)
	server, client := socketpair(t)
	m := nbdtest.NewMemory(1 << 20)
	e := &nbdexport.Export{Backend: m}
	done := make(chan error, 1)
	go func() { done <- nbdexport.ServeTransmission(t.Context(), server, e) }()
	c := nbdtest.NewClient(t, client)
	p := randomBytes(6, 4096)
	write(c, 0, 0, p)
	if r := read(c, 0, 4096); !bytes.Equal(r.Data, p) {
		t.Error("content differs")
	}
	c.Send(nbdtest.Request{Type: nbdtest.CmdDisconnect})
	if err := <-done; err != nil {
		t.Errorf("after DISC: %v: want nil", err)
	}
	c.ExpectClosed()
}

// TestDisconnectAnswersWhatIsUnderWay checks that DISC does not drop requests
// that were sent before it.
func TestDisconnectAnswersWhatIsUnderWay(t *testing.T) {
	forModes(t, 1<<20, func(t *testing.T, c *nbdtest.Client, m *nbdtest.Memory) {
		gate := make(chan struct{})
		m.Before = func(op string, _, _ int64) error {
			if op == "flush" {
				<-gate
			}
			return nil
		}
		c.Send(nbdtest.Request{Type: nbdtest.CmdFlush, Cookie: 9})
		c.Send(nbdtest.Request{Type: nbdtest.CmdDisconnect, Cookie: 10})
		close(gate)
		if msg := c.Receive(); msg.Cookie != 9 || msg.Err != 0 {
			t.Errorf("got %+v: want success of cookie 9", msg)
		}
		c.ExpectClosed()
	})
}
