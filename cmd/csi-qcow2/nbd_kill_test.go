package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
)

var nbdKills = flag.Int("nbd-kills", 200, "how often TestNBDKilledUnderLoad kills the server")

// A killClient behaves as the kernel's nbd client does: it keeps its requests
// until they are answered, and sends them again when it gets a new connection.
// Requests under way at the same time do not overlap.
type killClient struct {
	t    *testing.T
	rng  *rand.Rand
	size int64

	mu      sync.Mutex
	content []byte                  // acknowledged; guarded by mu
	pending map[uint64]*killRequest // not answered; guarded by mu
	cookie  uint64                  // guarded by mu
	acked   int                     // guarded by mu
	resent  int
}

// A killRequest is a change, or a flush.
type killRequest struct {
	command uint16
	off, n  int64
	data    []byte // what [off, off+n) becomes; nil for a flush
}

const (
	killSector   = 512
	killDepth    = 16
	nbdWrite     = 1
	nbdFlush     = 3
	nbdTrim      = 4
	nbdZeroes    = 6
	nbdRequest   = 0x25609513
	nbdReply     = 0x67446698
	nbdClientFix = 3 // fixed newstyle, no zeroes
)

// handshake negotiates the default export.
func handshake(conn net.Conn) error {
	var greeting [18]byte
	if _, err := io.ReadFull(conn, greeting[:]); err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint32(nil, nbdClientFix)
	b = append(b, "IHAVEOPT"...)
	b = binary.BigEndian.AppendUint32(b, 7) // GO
	b = binary.BigEndian.AppendUint32(b, 6)
	b = append(b, 0, 0, 0, 0, 0, 0)
	if _, err := conn.Write(b); err != nil {
		return err
	}
	for {
		var head [20]byte
		if _, err := io.ReadFull(conn, head[:]); err != nil {
			return err
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(head[16:]))); err != nil {
			return err
		}
		switch reply := binary.BigEndian.Uint32(head[12:]); {
		case reply == 1:
			return nil
		case reply>>31 != 0:
			return fmt.Errorf("GO was answered with %#x", reply)
		}
	}
}

// next makes a request whose range no pending one touches; nil when there is no room.
func (c *killClient) next() *killRequest {
	if c.rng.IntN(24) == 0 {
		return &killRequest{command: nbdFlush}
	}
	for range 20 {
		off := c.rng.Int64N(c.size/killSector) * killSector
		n := min((1+c.rng.Int64N(96))*killSector, c.size-off)
		r := &killRequest{command: nbdWrite, off: off, n: n, data: make([]byte, n)}
		switch c.rng.IntN(8) {
		case 0:
			r.command = nbdZeroes
		case 1:
			// Whole clusters: a discard leaves parts as they are.
			r.command = nbdTrim
			r.off = off &^ 4095
			r.n = 4096 * (1 + c.rng.Int64N(8))
			r.n = min(r.n, c.size-r.off)
			r.data = make([]byte, r.n)
		default:
			for i := range r.data {
				r.data[i] = byte(c.rng.Uint32())
			}
		}
		if !c.overlaps(r) {
			return r
		}
	}
	return nil
}

func (c *killClient) overlaps(r *killRequest) bool {
	for _, p := range c.pending {
		if p.data != nil && r.off < p.off+p.n && p.off < r.off+r.n {
			return true
		}
	}
	return false
}

// send writes one request.
func (r *killRequest) send(w io.Writer, cookie uint64) error {
	b := binary.BigEndian.AppendUint32(nil, nbdRequest)
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint16(b, r.command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(r.off))
	b = binary.BigEndian.AppendUint32(b, uint32(r.n))
	if r.command == nbdWrite {
		b = append(b, r.data...)
	}
	_, err := w.Write(b)
	return err
}

// drive loads the server on conn until the connection breaks.
func (c *killClient) drive(conn net.Conn) error {
	room := make(chan struct{}, killDepth)
	broken := make(chan error, 1)
	c.mu.Lock()
	for cookie, r := range c.pending { // in the map's random order
		room <- struct{}{}
		c.resent++
		if err := r.send(conn, cookie); err != nil {
			c.mu.Unlock()
			return nil
		}
	}
	c.mu.Unlock()
	go func() { broken <- c.receive(conn, room) }() // ends with the connection
	for {
		select {
		case room <- struct{}{}:
		case err := <-broken:
			return err
		}
		c.mu.Lock()
		r := c.next()
		if r == nil {
			c.mu.Unlock()
			<-room
			continue
		}
		c.cookie++
		cookie := c.cookie
		c.pending[cookie] = r
		c.mu.Unlock()
		if r.send(conn, cookie) != nil {
			return <-broken
		}
	}
}

// receive takes replies until the connection breaks.
func (c *killClient) receive(conn net.Conn, room chan struct{}) error {
	in := bufio.NewReader(conn)
	for {
		var head [16]byte
		if _, err := io.ReadFull(in, head[:]); err != nil {
			return nil // the server was killed
		}
		if magic := binary.BigEndian.Uint32(head[:]); magic != nbdReply {
			return fmt.Errorf("reply magic %#x", magic)
		}
		cookie := binary.BigEndian.Uint64(head[8:])
		c.mu.Lock()
		r := c.pending[cookie]
		code := binary.BigEndian.Uint32(head[4:])
		if r == nil || code != 0 {
			c.mu.Unlock()
			return fmt.Errorf("reply to %d: error %d", cookie, code)
		}
		if r.data != nil {
			copy(c.content[r.off:], r.data)
		}
		delete(c.pending, cookie)
		c.acked++
		c.mu.Unlock()
		<-room
	}
}

// verify compares the disk that conn serves with what was acknowledged. A sector
// of a pending change may be old or new.
func (c *killClient) verify(conn net.Conn) error {
	b := binary.BigEndian.AppendUint32(nil, nbdRequest)
	b = append(b, 0, 0, 0, 0) // READ
	b = binary.BigEndian.AppendUint64(b, 0)
	b = binary.BigEndian.AppendUint64(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(c.size))
	if _, err := conn.Write(b); err != nil {
		return err
	}
	got := make([]byte, 16+c.size)
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if code := binary.BigEndian.Uint32(got[4:]); code != 0 {
		return fmt.Errorf("read: error %d", code)
	}
	got = got[16:]
	maybe := bytes.Clone(c.content)
	for _, r := range c.pending {
		copy(maybe[r.off:], r.data)
	}
	for off := 0; off < len(got); off += killSector {
		g := got[off : off+killSector]
		if !bytes.Equal(g, c.content[off:off+killSector]) && !bytes.Equal(g, maybe[off:off+killSector]) {
			return fmt.Errorf("sector at %#x: %x…, acknowledged was %x…", off, g[:8], c.content[off:off+8])
		}
	}
	return nil
}

// TestNBDKilledUnderLoad kills a real server with SIGKILL at random times, starts
// it again on the same run directory, and loses nothing that it acknowledged (P1).
func TestNBDKilledUnderLoad(t *testing.T) {
	const size = 8 << 20
	path, err := nbdBinary()
	if err != nil {
		t.Fatal(err)
	}
	dir := storagetest.MemoryDir(t)
	image := filepath.Join(dir, "disk.qcow2")
	qemutest.Create(t, image, size, "cluster_size=4096")
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	c := &killClient{t: t, rng: rand.New(rand.NewPCG(seed, 0)), size: size,
		content: make([]byte, size), pending: make(map[uint64]*killRequest)}
	socket := filepath.Join(dir, "s")
	for kill := 0; kill <= *nbdKills && !t.Failed(); kill++ {
		var stderr bytes.Buffer
		server := exec.Command(path, "nbd", "-t", "-f", "qcow2", "-k", socket, "-e", "4", "--discard=unmap", "--run-dir", filepath.Join(dir, "run"), image)
		server.Stderr = &stderr
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		conn, err := connect(socket, server, &stderr)
		if err != nil {
			server.Process.Kill()
			server.Wait()
			t.Fatalf("after kill %d: %v", kill, err)
		}
		if err := c.verify(conn); err != nil {
			t.Errorf("after kill %d: %v", kill, err)
		}
		if kill < *nbdKills {
			killer := time.AfterFunc(time.Duration(c.rng.IntN(60_000))*time.Microsecond, func() { server.Process.Kill() })
			if err := c.drive(conn); err != nil {
				t.Errorf("after kill %d: %v\n%s", kill, err, &stderr)
			}
			killer.Stop()
			server.Process.Kill()
			server.Wait()
		} else {
			server.Process.Signal(os.Interrupt)
			if err := server.Wait(); err != nil {
				t.Errorf("the last server: %v\n%s", err, &stderr)
			}
		}
		conn.Close()
		os.Remove(socket)
	}
	qemutest.Check(t, image)
	if t.Failed() {
		return // the zero below would not be true
	}
	t.Logf("%d kills, %d requests acknowledged, %d sent again, 0 lost", *nbdKills, c.acked, c.resent)
}

// connect connects to a server that is starting, and negotiates.
func connect(socket string, server *exec.Cmd, stderr *bytes.Buffer) (net.Conn, error) {
	deadline := time.Now().Add(processTime)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			if err = handshake(conn); err == nil {
				return conn, nil
			}
			conn.Close()
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("no server in %s: %s", processTime, stderr), err)
		}
		time.Sleep(time.Millisecond) // its next poll; there is nothing to wait on
	}
}
