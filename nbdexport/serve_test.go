package nbdexport_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// A testServer is a Server on a unix socket for one test.
type testServer struct {
	*nbdexport.Server
	t      testing.TB
	socket string
	stop   context.CancelFunc
	done   chan error
}

// startServer serves exports until the test ends, and then checks that no
// goroutine is left.
func startServer(t testing.TB, o nbdexport.ServerOptions, exports ...*nbdexport.Export) *testServer {
	t.Helper()
	verifyNoLeaks(t)
	s := &testServer{Server: nbdexport.NewServer(o), t: t, done: make(chan error, 1)}
	for _, e := range exports {
		if err := s.AddExport(e); err != nil {
			t.Fatal(err)
		}
	}
	s.socket = filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	var ctx context.Context
	ctx, s.stop = context.WithCancel(context.Background())
	go func() { s.done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		s.stop()
		s.wait()
	})
	return s
}

// verifyNoLeaks checks at the end of the test, after everything that it
// registers from now on, that its goroutines have ended.
func verifyNoLeaks(t testing.TB) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
}

// wait waits until Serve has returned.
func (s *testServer) wait() {
	s.t.Helper()
	select {
	case err := <-s.done:
		s.done <- err
	case <-time.After(2 * time.Minute):
		s.t.Fatal("Serve does not return")
	}
}

func (s *testServer) dial() net.Conn {
	s.t.Helper()
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	return conn
}

// client returns a client that has not said anything yet.
func (s *testServer) client() *nbdtest.Client {
	s.t.Helper()
	return nbdtest.NewClient(s.t, s.dial())
}

// socketpair returns two connected unix sockets.
func socketpair(t testing.TB) (server, client net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { conns[0].Close(); conns[1].Close() })
	return conns[0], conns[1]
}
