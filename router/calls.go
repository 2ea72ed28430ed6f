package router

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// calls counts the RPCs under way and refuses new ones while draining.
type calls struct {
	mu       sync.Mutex
	draining bool // guarded by mu
	running  sync.WaitGroup
}

// begin counts one call; the caller ends it with running.Done.
func (c *calls) begin() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining {
		return status.Error(codes.Unavailable, "the controller is stopping")
	}
	c.running.Add(1)
	return nil
}

func (c *calls) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := c.begin(); err != nil {
		return nil, err
	}
	defer c.running.Done()
	return handler(ctx, req)
}

func (c *calls) admitStream(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := c.begin(); err != nil {
		return err
	}
	defer c.running.Done()
	return handler(srv, stream)
}

// drain refuses new calls and waits for those under way, at most for limit. It
// reports whether they have ended.
func (c *calls) drain(limit time.Duration) bool {
	c.mu.Lock()
	c.draining = true
	c.mu.Unlock()
	done := make(chan struct{})
	go func() { c.running.Wait(); close(done) }() // ends with the last call
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case <-done:
		return true
	case <-timeout.C:
		return false
	}
}
