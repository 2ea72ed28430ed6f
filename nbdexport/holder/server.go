package holder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	socketName = "holder.sock"
	lockName   = "holder.lock"

	exchangeTimeout = 5 * time.Second
	maxConns        = 16

	// startGrace is how long a Server that ends when it is idle waits for the first connection.
	startGrace = 10 * time.Second
)

// ErrRunning reports that another holder serves the run directory.
var ErrRunning = errors.New("holder: another process holds for this run directory")

// A Server holds descriptors. It is made with Listen.
type Server struct {
	lock     *os.File
	listener *net.UnixListener
	slots    chan struct{} // one for each connection

	mu    sync.Mutex       // leaf
	held  map[string][]int // by name; guarded by mu
	conns int              // guarded by mu
	quiet chan struct{}    // gets a value when nothing is held or nobody is connected any more
}

// Listen makes the socket of runDir, which must exist. It returns ErrRunning when
// another process has it.
func Listen(runDir string) (*Server, error) {
	lock, err := os.OpenFile(filepath.Join(runDir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %q", ErrRunning, runDir)
		}
		return nil, fmt.Errorf("lock %q: %w", lock.Name(), err)
	}
	path := filepath.Join(runDir, socketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // of one that was killed
		return nil, errors.Join(err, lock.Close())
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close(), lock.Close())
	}
	return &Server{
		lock:     lock,
		listener: l,
		slots:    make(chan struct{}, maxConns),
		held:     make(map[string][]int),
		quiet:    make(chan struct{}, 1),
	}, nil
}

// Serve holds until ctx has ended and nothing is held. With untilIdle it also
// returns when nothing is held and nobody is connected.
func (s *Server) Serve(ctx context.Context, untilIdle bool) error {
	var conns sync.WaitGroup
	all, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer conns.Wait()
	defer cancel()
	accepted := make(chan error, 1)
	conns.Go(func() { accepted <- s.accept(all, &conns) }) // ends with the listener
	defer s.listener.Close()                               // removes the socket
	defer s.lock.Close()

	grace := time.NewTimer(startGrace)
	defer grace.Stop()
	ended := ctx.Done()
	stop, young := false, true
	for {
		s.mu.Lock()
		empty, alone := len(s.held) == 0, s.conns == 0
		s.mu.Unlock()
		if empty && (stop || untilIdle && alone && !young) {
			return nil
		}
		select {
		case err := <-accepted:
			return err
		case <-ended:
			stop, ended = true, nil
		case <-s.quiet:
			young = false
		case <-grace.C:
			young = false
		}
	}
}

// Held returns how many names have something.
func (s *Server) Held() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held)
}

// accept serves connections until the listener is closed.
func (s *Server) accept(ctx context.Context, conns *sync.WaitGroup) error {
	for {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		c, err := s.listener.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		s.mu.Lock()
		s.conns++
		s.mu.Unlock()
		conns.Go(func() { // ends with the connection, or ctx
			s.serve(ctx, c)
			<-s.slots
			s.mu.Lock()
			s.conns--
			s.mu.Unlock()
			s.note()
		})
	}
}

// note lets Serve look again.
func (s *Server) note() {
	select {
	case s.quiet <- struct{}{}:
	default:
	}
}

// serve answers the messages of one connection. One that is none ends it.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if checkPeer(c) != nil {
		return
	}
	for {
		m, err := receive(c)
		if err != nil {
			return
		}
		reply := s.handle(m)
		err = c.SetWriteDeadline(time.Now().Add(exchangeTimeout))
		if err == nil {
			err = send(c, reply)
		}
		closeAll(reply.fds)
		if err != nil {
			return
		}
		if m.code == codeDrop {
			s.note()
		}
	}
}

// handle does what m asks for. The descriptors of its result are the caller's: what is held may be dropped
// before they are sent.
func (s *Server) handle(m message) message {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.code != codePut {
		closeAll(m.fds)
	}
	switch m.code {
	case codePut:
		old, known := s.held[m.text]
		if err := checkPut(m); err != nil {
			closeAll(m.fds)
			return message{code: codeRefused, text: err.Error()}
		}
		if !known && len(s.held) >= maxNames {
			closeAll(m.fds)
			return message{code: codeRefused, text: fmt.Sprintf("%d names are held already", maxNames)}
		}
		s.held[m.text] = m.fds
		closeAll(old)
		return message{}
	case codeGet:
		held, known := s.held[m.text]
		if !known {
			return message{code: codeNotHeld}
		}
		fds, err := copies(held)
		if err != nil {
			return message{code: codeRefused, text: err.Error()}
		}
		return message{fds: fds}
	case codeDrop:
		closeAll(s.held[m.text])
		delete(s.held, m.text)
		return message{}
	case codeList:
		var text strings.Builder
		for _, name := range slices.Sorted(maps.Keys(s.held)) {
			text.WriteString(name + "\n")
		}
		return message{text: text.String()}
	}
	return message{code: codeRefused, text: fmt.Sprintf("unknown request %d", m.code)}
}

// copies returns copies of fds.
func copies(fds []int) ([]int, error) {
	var all []int
	for _, fd := range fds {
		next, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			closeAll(all)
			return nil, fmt.Errorf("copy a descriptor: %w", err)
		}
		all = append(all, next)
	}
	return all, nil
}

// checkPut checks a message that puts something.
func checkPut(m message) error {
	switch {
	case len(m.text) < 1 || len(m.text) > maxName || strings.ContainsRune(m.text, '\n'):
		return fmt.Errorf("name %q: want 1 to %d bytes without a newline", m.text, maxName)
	case len(m.fds) < 1 || len(m.fds) > maxFDs:
		return fmt.Errorf("%d descriptors: want 1 to %d", len(m.fds), maxFDs)
	}
	return nil
}
