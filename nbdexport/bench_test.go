package nbdexport_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"testing"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// A benchClient keeps depth requests of one kind under way, and allocates
// nothing while it does.
type benchClient struct {
	b       *testing.B
	conn    net.Conn
	request []byte // depth requests, one after another
	size    int    // bytes of one of them
	reply   int    // bytes of one reply
}

// run sends b.N requests.
func (c *benchClient) run(depth int) {
	in := make([]byte, max(c.reply, 256<<10))
	send := func(n int) {
		if _, err := c.conn.Write(c.request[:n*c.size]); err != nil {
			c.b.Fatal(err)
		}
	}
	c.b.ReportAllocs()
	c.b.ResetTimer()
	sent := min(depth, c.b.N)
	send(sent)
	for done, have := 0, 0; done < c.b.N; {
		n, err := c.conn.Read(in[have:])
		if err != nil {
			c.b.Fatal(err)
		}
		have += n
		complete := have / c.reply
		if complete == 0 {
			continue
		}
		if magic := binary.BigEndian.Uint64(in); magic != 0x67446698<<32 {
			c.b.Fatalf("reply %#x", magic)
		}
		have = copy(in, in[complete*c.reply:have])
		done += complete
		more := min(complete, c.b.N-sent)
		send(more)
		sent += more
	}
	c.b.StopTimer()
}

// BenchmarkServe measures requests over a socketpair, with simple replies, on
// a raw file: the server's own cost and that of system calls.
func BenchmarkServe(b *testing.B) {
	const size = 64 << 20
	for _, tt := range []struct {
		name  string
		r     nbdtest.Request
		depth int
	}{
		{"read-4k-qd1", nbdtest.Request{Type: nbdtest.CmdRead, Len: 4096}, 1},
		{"read-4k-qd32", nbdtest.Request{Type: nbdtest.CmdRead, Len: 4096}, 32},
		{"write-4k-qd1", nbdtest.Request{Type: nbdtest.CmdWrite, Len: 4096, Payload: make([]byte, 4096)}, 1},
		{"write-4k-qd32", nbdtest.Request{Type: nbdtest.CmdWrite, Len: 4096, Payload: make([]byte, 4096)}, 32},
		{"read-1m-qd4", nbdtest.Request{Type: nbdtest.CmdRead, Len: 1 << 20}, 4},
		{"write-1m-qd4", nbdtest.Request{Type: nbdtest.CmdWrite, Len: 1 << 20, Payload: make([]byte, 1<<20)}, 4},
	} {
		b.Run(tt.name, func(b *testing.B) {
			file, err := nbdtest.NewFileBackend(filepath.Join(b.TempDir(), "disk"), size)
			if err != nil {
				b.Fatal(err)
			}
			defer file.Close()
			if _, err := file.WriteAt(make([]byte, size), 0); err != nil {
				b.Fatal(err)
			}
			server, client := socketpair(b)
			done := make(chan error, 1)
			go func() {
				done <- nbdexport.ServeTransmission(b.Context(), server, &nbdexport.Export{Backend: file})
			}()
			c := &benchClient{b: b, conn: client, reply: 16}
			for i := range tt.depth {
				tt.r.Off = uint64(i) * 1 << 20 % size
				c.request = append(c.request, tt.r.Encode(false)...)
			}
			c.size = len(c.request) / tt.depth
			if tt.r.Type == nbdtest.CmdRead {
				c.reply += int(tt.r.Len)
			}
			b.SetBytes(int64(tt.r.Len))
			c.run(tt.depth)
			client.Close()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		})
	}
}

// TestSteadyStateAllocatesNothing holds the benchmark's figure in the tests.
func TestSteadyStateAllocatesNothing(t *testing.T) {
	for _, r := range []nbdtest.Request{
		{Type: nbdtest.CmdRead, Len: 4096},
		{Type: nbdtest.CmdWrite, Len: 4096, Payload: make([]byte, 4096)},
		{Type: nbdtest.CmdRead, Len: 128 << 10},
		{Type: nbdtest.CmdWrite, Len: 128 << 10, Payload: make([]byte, 128<<10)},
		{Type: nbdtest.CmdFlush},
	} {
		t.Run(fmt.Sprintf("command %d of %d bytes", r.Type, r.Len), func(t *testing.T) {
			server, client := socketpair(t)
			done := make(chan error, 1)
			go func() {
				done <- nbdexport.ServeTransmission(t.Context(), server, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
			}()
			request, reply := r.Encode(false), make([]byte, 16)
			if r.Type == nbdtest.CmdRead {
				reply = make([]byte, 16+r.Len)
			}
			roundTrip := func() {
				if _, err := client.Write(request); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(client, reply); err != nil {
					t.Fatal(err)
				}
			}
			for range 100 {
				roundTrip() // buffers and workers come into being
			}
			if n := testing.AllocsPerRun(2000, roundTrip); n != 0 {
				t.Errorf("%v allocations per request: want 0", n)
			}
			client.Close()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}
