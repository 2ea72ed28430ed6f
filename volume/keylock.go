package volume

import (
	"context"
	"fmt"
	"sync"
)

// A keyLock is a set of locks by ID. An operation that a user asked for gets
// ErrBusy when another one holds the lock, and waits for the reaper: nobody
// asked for that one, so nobody is to notice it.
type keyLock struct {
	mu   sync.Mutex
	held map[string]*holder // guarded by mu
}

type holder struct {
	reaper bool
	done   chan struct{} // closed on unlock
}

// lock locks key for an operation.
func (l *keyLock) lock(ctx context.Context, key string) (unlock func(), err error) {
	return l.acquire(ctx, key, false, func(h *holder) bool { return h.reaper })
}

// wait locks key for an operation, after whatever holds it.
func (l *keyLock) wait(ctx context.Context, key string) (unlock func(), err error) {
	return l.acquire(ctx, key, false, func(*holder) bool { return true })
}

// visit locks key, after whatever holds it, for a look: operations wait for it as
// for the reaper.
func (l *keyLock) visit(ctx context.Context, key string) (unlock func(), err error) {
	return l.acquire(ctx, key, true, func(*holder) bool { return true })
}

func (l *keyLock) acquire(ctx context.Context, key string, reaper bool, patient func(*holder) bool) (func(), error) {
	for {
		l.mu.Lock()
		h := l.held[key]
		if h == nil {
			unlock := l.takeLocked(key, reaper)
			l.mu.Unlock()
			return unlock, nil
		}
		l.mu.Unlock()
		if !patient(h) {
			return nil, fmt.Errorf("%w on %s", ErrBusy, key)
		}
		select {
		case <-h.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryReap locks key for the reaper unless it is held.
func (l *keyLock) tryReap(key string) (unlock func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[key] != nil {
		return nil, false
	}
	return l.takeLocked(key, true), true
}

func (l *keyLock) takeLocked(key string, reaper bool) func() {
	if l.held == nil {
		l.held = make(map[string]*holder)
	}
	h := &holder{reaper: reaper, done: make(chan struct{})}
	l.held[key] = h
	return func() {
		l.mu.Lock()
		delete(l.held, key)
		l.mu.Unlock()
		close(h.done)
	}
}
