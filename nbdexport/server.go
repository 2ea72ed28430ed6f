package nbdexport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"
)

// ServerOptions configure a Server. The zero value is ready to use.
type ServerOptions struct {
	// MaxConnections bounds the clients at a time; others wait to be accepted.
	// Default 100, and -1 means no bound. With 1, CAN_MULTI_CONN is not announced.
	MaxConnections int
	// HandshakeTimeout bounds the time from the connection to the transmission
	// phase. Default 10 s.
	HandshakeTimeout time.Duration
	// WriteTimeout bounds the time for which a client that is owed replies may
	// read nothing, to at most twice as much. Default 60 s.
	WriteTimeout time.Duration
	// ConnectionEnded, if not nil, is called after each connection:
	// negotiated says whether it reached the transmission phase, left is the
	// number of those that are still open.
	ConnectionEnded func(negotiated bool, left int)
}

func (o ServerOptions) withDefaults() ServerOptions {
	o.MaxConnections = cmp.Or(o.MaxConnections, 100)
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, 10*time.Second)
	o.WriteTimeout = cmp.Or(o.WriteTimeout, 60*time.Second)
	return o
}

// A Server lets clients choose among exports and serves them. Its methods may
// be called from many goroutines at once.
type Server struct {
	opts ServerOptions

	mu      sync.Mutex
	exports map[string]*Export // by name; guarded by mu
	open    int                // connections; guarded by mu
}

// NewServer returns a Server without exports.
func NewServer(opts ServerOptions) *Server {
	return &Server{opts: opts.withDefaults(), exports: make(map[string]*Export)}
}

// AddExport makes e available to clients that connect from now on. It returns
// ErrExportExists if the name is taken. e must not be changed any more.
func (s *Server) AddExport(e *Export) error {
	if len(e.Name) > maxString || len(e.Description) > maxString {
		return fmt.Errorf("nbdexport: export %.40q: name or description: %w", e.Name, errStringTooLong)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exports[e.Name] != nil {
		return fmt.Errorf("%w: %q", ErrExportExists, e.Name)
	}
	s.exports[e.Name] = e
	return nil
}

// RemoveExport hides the export from new clients. Connections that use it go on.
func (s *Server) RemoveExport(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.exports, name)
}

// lookup returns the export, or nil.
func (s *Server) lookup(name string) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

// list returns the exports in the order of their names.
func (s *Server) list() []*Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*Export, 0, len(s.exports))
	for _, e := range s.exports {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b *Export) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// Serve accepts and serves connections of l until ctx ends or l fails; it
// closes l. When it returns, every connection that it accepted is closed, and
// what those had read is answered. It returns ErrServerClosed when ctx ended it.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() }) // ends Accept; its error says so
	defer stop()
	// Whether ctx ended is asked of ctx, not of a child: a child may learn of it after l is closed.
	connCtx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()

	var slots chan struct{} // nil without a bound: a send would block for ever
	if s.opts.MaxConnections > 0 {
		slots = make(chan struct{}, s.opts.MaxConnections)
	}
	for {
		if slots != nil {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return fmt.Errorf("%w: %w", ErrServerClosed, ctx.Err())
			}
		}
		nc, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && !outOfResources(err) {
				l.Close()
				return fmt.Errorf("nbdexport: accept: %w", err)
			}
			if slots != nil {
				<-slots
			}
			select { // connections that end free resources; the client waits
			case <-time.After(acceptPause):
				continue
			case <-ctx.Done():
				return fmt.Errorf("%w: %w", ErrServerClosed, ctx.Err())
			}
		}
		conns.Add(1)
		go func() { // ends with the connection, which ends with ctx
			defer conns.Done()
			s.ServeConn(connCtx, nc)
			if slots != nil {
				<-slots
			}
		}()
	}
}

// acceptPause is the time between attempts to accept while the process or the
// machine is short of file descriptors or memory.
const acceptPause = 100 * time.Millisecond

// outOfResources reports whether err may go away without anybody's help.
func outOfResources(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// ServeConn performs the handshake and the transmission phase on nc, and
// closes it. The outcome is logged.
func (s *Server) ServeConn(ctx context.Context, nc net.Conn) {
	s.mu.Lock()
	s.open++
	s.mu.Unlock()
	negotiated, err := s.serveConn(ctx, nc)
	s.mu.Lock()
	s.open--
	left := s.open
	s.mu.Unlock()

	log := klog.FromContext(ctx)
	switch {
	case err == nil, errors.Is(err, errAborted), errors.Is(err, io.EOF), ctx.Err() != nil:
		log.V(2).Info("NBD connection ended", "negotiated", negotiated, "clientsLeft", left)
	default:
		log.Error(err, "NBD connection failed", "negotiated", negotiated, "clientsLeft", left)
	}
	if s.opts.ConnectionEnded != nil {
		s.opts.ConnectionEnded(negotiated, left)
	}
}

// serveConn does the work of ServeConn.
func (s *Server) serveConn(ctx context.Context, nc net.Conn) (negotiated bool, err error) {
	h := handshake{conn: nc, lookup: s.lookup, list: s.list, single: s.opts.MaxConnections == 1}
	if err := s.negotiate(ctx, nc, &h); err != nil {
		nc.Close() // err says more
		return false, err
	}
	klog.FromContext(ctx).V(2).Info("NBD connection established", "export", h.export.Name,
		"structured", h.terms.structured, "extended", h.terms.extended)
	return true, newConn(nc, h.export.Backend, h.terms, s.opts.WriteTimeout).serve(ctx)
}

// negotiate runs h before the deadline for it, or until ctx ends.
func (s *Server) negotiate(ctx context.Context, nc net.Conn, h *handshake) error {
	if err := nc.SetDeadline(time.Now().Add(s.opts.HandshakeTimeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	err := h.run()
	if !stop() {
		return ctx.Err() // the deadline of the past is set, or about to be
	}
	if err != nil {
		return err
	}
	return nc.SetDeadline(time.Time{})
}
