package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// serve runs a holder in dir until the test ends, or until stop is called.
func serve(t *testing.T, dir string, untilIdle bool) (s *Server, stop func() error) {
	t.Helper()
	s, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, untilIdle) }() // ends with ctx, when nothing is held
	var once bool
	stop = func() error {
		if once {
			return nil
		}
		once = true
		cancel()
		return <-ended
	}
	t.Cleanup(func() {
		dropAll(s)
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return s, stop
}

// dropAll drops what s holds, as the end of its process does.
func dropAll(s *Server) {
	s.mu.Lock()
	for name, fds := range s.held {
		closeAll(fds)
		delete(s.held, name)
	}
	s.mu.Unlock()
	s.note()
}

func newClient(t *testing.T, dir string, start func() error) *Client {
	t.Helper()
	c := NewClient(dir, start)
	t.Cleanup(func() { c.Close() })
	return c
}

// tempFile returns a file with content, and no name.
func tempFile(t *testing.T, content string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	return f
}

// contents reads and closes descriptors.
func contents(t *testing.T, fds []int) []string {
	t.Helper()
	var all []string
	for _, fd := range fds {
		b := make([]byte, 100)
		n, err := unix.Pread(fd, b, 0)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(b[:n]))
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("a child would inherit descriptor %d: %v", fd, err)
		}
	}
	closeAll(fds)
	return all
}

func TestHoldAndGet(t *testing.T) {
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	_, stop := serve(t, dir, false)
	c := newClient(t, dir, nil)
	a, b := tempFile(t, "a"), tempFile(t, "b")
	if err := c.Put("one", int(a.Fd()), int(b.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := c.Put("two", int(b.Fd())); err != nil {
		t.Fatal(err)
	}
	a.Close()
	b.Close()
	c.Leave("one")
	c.Leave("two")
	c.Close()

	next := newClient(t, dir, nil) // the successor
	if names, err := next.List(); err != nil || !slices.Equal(names, []string{"one", "two"}) {
		t.Errorf("list: %q, %v", names, err)
	}
	for range 2 { // a successor may be killed, too
		fds, err := next.Get("one")
		if err != nil {
			t.Fatal(err)
		}
		if got := contents(t, fds); !slices.Equal(got, []string{"a", "b"}) {
			t.Errorf("held: %q", got)
		}
	}
	if _, err := next.Get("three"); !errors.Is(err, ErrNotHeld) {
		t.Errorf("get of what is not held: %v", err)
	}
	for _, name := range []string{"one", "two", "three"} {
		if err := next.Drop(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := next.Get("one"); !errors.Is(err, ErrNotHeld) {
		t.Errorf("get of what was dropped: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, socketName)); err == nil {
		t.Error("the socket is left")
	}
	next.Close()
}

// TestPutAgain replaces what was held.
func TestPutAgain(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, false)
	c := newClient(t, dir, nil)
	for _, content := range []string{"a", "b"} {
		if err := c.Put("v", int(tempFile(t, content).Fd())); err != nil {
			t.Fatal(err)
		}
	}
	fds, err := c.Get("v")
	if err != nil {
		t.Fatal(err)
	}
	if got := contents(t, fds); !slices.Equal(got, []string{"b"}) {
		t.Errorf("held: %q", got)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	s, _ := serve(t, dir, false)
	c := newClient(t, dir, nil)
	fd := int(tempFile(t, "a").Fd())
	for name, fds := range map[string][]int{"": {fd}, strings.Repeat("x", maxName+1): {fd}, "a\nb": {fd}, "none": {}, "many": {fd, fd, fd, fd, fd}} {
		if err := c.Put(name, fds...); err == nil {
			t.Errorf("put of %d descriptors under %.20q succeeded", len(fds), name)
		}
	}
	for i := range maxNames {
		s.handle(message{code: codePut, text: fmt.Sprintf("%0*d", maxName, i), fds: []int{dupOf(t, fd)}})
	}
	if err := c.Put("one more", fd); err == nil || !strings.Contains(err.Error(), "1024 names") {
		t.Errorf("one name more: %v", err)
	}
	if c.Err() == nil {
		t.Error("the client believes that all is held")
	}
	if names, err := c.List(); err != nil || len(names) != maxNames {
		t.Errorf("%d names, %v", len(names), err)
	}
}

func dupOf(t *testing.T, fd int) int {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestStrangers: what is no message ends the connection, and nothing else.
func TestStrangers(t *testing.T) {
	dir := t.TempDir()
	s, _ := serve(t, dir, false)
	fd := int(tempFile(t, "a").Fd())
	for name, packet := range map[string][]byte{
		"short":   []byte("csqh"),
		"magic":   []byte("xxxx\x01\x01\x00\x00name"),
		"version": []byte("csqh\x02\x01\x00\x00name"),
		"long":    append([]byte("csqh\x01\x01\x00\x00"), make([]byte, maxMessage)...),
	} {
		conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: filepath.Join(dir, socketName), Net: "unixpacket"})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := conn.WriteMsgUnix(packet, unix.UnixRights(fd), nil); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		if n, err := conn.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %d bytes, %v; want the end of the connection", name, n, err)
		}
		conn.Close()
	}
	for _, m := range []message{{code: 9, text: "v"}, {code: codePut, text: "v"}} {
		if r := s.handle(m); r.code != codeRefused {
			t.Errorf("request %d: %d, want a refusal", m.code, r.code)
		}
	}
	if s.Held() != 0 {
		t.Error("something is held")
	}
}

func TestSecondHolder(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, false)
	if _, err := Listen(dir); !errors.Is(err, ErrRunning) {
		t.Errorf("%v, want ErrRunning", err)
	}
}

// TestHolderOfAnEndedProcess: a socket that was left is replaced.
func TestHolderOfAnEndedProcess(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(dir, socketName), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	c := newClient(t, dir, nil)
	if err := c.Put("v", int(tempFile(t, "a").Fd())); !errors.Is(err, ErrNone) {
		t.Errorf("put without a holder: %v", err)
	}
	serve(t, dir, false)
	if err := c.Sync(); err != nil || c.Err() != nil {
		t.Errorf("sync: %v, %v", err, c.Err())
	}
	if fds, err := c.Get("v"); err != nil || len(contents(t, fds)) != 1 {
		t.Errorf("get: %v", err)
	}
}

// TestStoppedHolderHolds: it ends when nothing is held.
func TestStoppedHolderHolds(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := newClient(t, dir, nil)
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- s.Serve(ctx, false) }()
	if err := c.Put("v", int(tempFile(t, "a").Fd())); err != nil {
		t.Fatal(err)
	}
	cancel()
	if fds, err := c.Get("v"); err != nil || len(contents(t, fds)) != 1 {
		t.Errorf("get: %v", err)
	}
	if err := c.Drop("v"); err != nil {
		t.Fatal(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestIdleHolderEnds: a holder that was started on demand ends when its client is
// gone and nothing is held, not before.
func TestIdleHolderEnds(t *testing.T) {
	dir := t.TempDir()
	s, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(context.Background(), true) }()
	first := newClient(t, dir, nil)
	if err := first.Put("v", int(tempFile(t, "a").Fd())); err != nil {
		t.Fatal(err)
	}
	first.Close()
	next := newClient(t, dir, nil)
	if err := next.Drop("v"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
		t.Fatal("it ended with a client connected")
	default:
	}
	next.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestNewHolder: when the holder ends, another is started and has everything.
func TestNewHolder(t *testing.T) {
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	type instance struct {
		s     *Server
		kill  context.CancelFunc
		ended chan error
	}
	instances := make(chan instance, 10)
	start := func() error {
		s, err := Listen(dir)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		i := instance{s, cancel, make(chan error, 1)}
		go func() { i.ended <- s.Serve(ctx, false) }()
		instances <- i
		return nil
	}
	end := func(i instance) { // as a kill does: what it holds is closed, and so are its connections
		i.kill()
		for {
			dropAll(i.s) // again, when the client was about to put
			select {
			case err := <-i.ended:
				if err != nil {
					t.Error(err)
				}
				return
			case <-time.After(time.Millisecond):
			}
		}
	}
	c := NewClient(dir, start)
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan bool)
	go func() { c.Run(ctx); close(ran) }()
	if err := c.Put("v", int(tempFile(t, "a").Fd())); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		end(<-instances)
		i := <-instances // started by Run
		for i.s.Held() != 1 {
			time.Sleep(time.Millisecond)
		}
		instances <- i
	}
	for c.Err() != nil {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-ran
	if err := c.Drop("v"); err != nil {
		t.Error(err)
	}
	c.Close()
	end(<-instances)
}
