package nbdexport_test

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// A scriptedListener returns what is in its channels.
type scriptedListener struct {
	errs   chan error
	conns  chan net.Conn
	closed chan struct{}
}

func newScriptedListener() *scriptedListener {
	return &scriptedListener{make(chan error, 8), make(chan net.Conn, 8), make(chan struct{})}
}

func (l *scriptedListener) Accept() (net.Conn, error) {
	select {
	case err := <-l.errs:
		return nil, err
	default:
	}
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *scriptedListener) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}

func (l *scriptedListener) Addr() net.Addr { return &net.UnixAddr{} }

// TestServeOutlivesShortageOfDescriptors checks that a full descriptor table
// delays clients and does not end the server.
func TestServeOutlivesShortageOfDescriptors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newScriptedListener()
		for range 3 {
			l.errs <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		}
		server, client := net.Pipe()
		l.conns <- server
		ctx, cancel := context.WithCancel(t.Context())
		s := nbdexport.NewServer(nbdexport.ServerOptions{MaxConnections: 1})
		if err := s.AddExport(&nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)}); err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- s.Serve(ctx, l) }()
		c := nbdtest.NewClient(t, client)
		c.Start("", nbdtest.Simple)
		client.Close()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v: want context.Canceled", err)
		}
	})
}

func TestServeEndsWithItsListener(t *testing.T) {
	l := newScriptedListener()
	l.errs <- syscall.EINVAL
	err := nbdexport.NewServer(nbdexport.ServerOptions{}).Serve(t.Context(), l)
	if !errors.Is(err, syscall.EINVAL) {
		t.Errorf("got %v: want EINVAL", err)
	}
}

// firstOnly is a context that ends for the first who asked to be called, and
// for its own Err, while its children have yet to learn of it.
type firstOnly struct {
	context.Context
	done  chan struct{}
	first func()
}

func (c *firstOnly) Done() <-chan struct{} { return c.done }

func (c *firstOnly) Err() error {
	select {
	case <-c.done:
		return context.Canceled
	default:
		return nil
	}
}

// AfterFunc is what package context calls for a child.
func (c *firstOnly) AfterFunc(f func()) (stop func() bool) {
	if c.first == nil {
		c.first = f
	}
	return func() bool { return true }
}

// TestServeSaysWhoEndedIt checks that a listener which the end of the context
// has closed is never taken for one that failed, however late a child of the
// context learns of the end.
func TestServeSaysWhoEndedIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := &firstOnly{Context: context.Background(), done: make(chan struct{})}
		done := make(chan error)
		go func() { done <- nbdexport.NewServer(nbdexport.ServerOptions{}).Serve(ctx, newScriptedListener()) }()
		synctest.Wait() // it accepts
		close(ctx.done)
		ctx.first()
		if err := <-done; !errors.Is(err, nbdexport.ErrServerClosed) {
			t.Errorf("Serve: %v: want ErrServerClosed", err)
		}
	})
}

// TestStopDoesNotWaitForASlowReader ends the server while a client does not
// take its reply.
func TestStopDoesNotWaitForASlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- nbdexport.ServeTransmission(ctx, server, &nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)})
		}()
		c := nbdtest.NewClient(t, client)
		c.Send(nbdtest.Request{Type: nbdtest.CmdRead, Len: 4096})
		synctest.Wait() // the server waits for us to read
		start := time.Now()
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v: want context.Canceled", err)
		}
		if waited := time.Since(start); waited > 10*time.Second {
			t.Errorf("waited %v for the client", waited)
		}
	})
}

// TestHandshakeDeadlineIsTenSeconds checks the default against a client that
// sends a byte now and then.
func TestHandshakeDeadlineIsTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, client := net.Pipe()
		s := nbdexport.NewServer(nbdexport.ServerOptions{})
		if err := s.AddExport(&nbdexport.Export{Backend: nbdtest.NewMemory(1 << 20)}); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.ServeConn(t.Context(), server)
		}()
		c := nbdtest.NewClient(t, client)
		c.Greet(3)
		for {
			if _, err := client.Write([]byte{'I'}); err != nil {
				break
			}
			time.Sleep(time.Second)
		}
		<-ended
		if took := time.Since(start); took < 9*time.Second || took > 11*time.Second {
			t.Errorf("the handshake lasted %v: want 10 s", took)
		}
	})
}
