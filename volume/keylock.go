package volume

import (
	"context"
	"fmt"
	"sync"
)

// A keyLock is a set of locks by name.
type keyLock struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed on unlock; guarded by mu
}

// try locks key, or returns ErrBusy when it is locked.
func (l *keyLock) try(key string) (unlock func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, busy := l.held[key]; busy {
		return nil, fmt.Errorf("%w on %s", ErrBusy, key)
	}
	return l.takeLocked(key), nil
}

// wait locks key, and waits for it as long as ctx allows.
func (l *keyLock) wait(ctx context.Context, key string) (unlock func(), err error) {
	for {
		l.mu.Lock()
		busy := l.held[key]
		if busy == nil {
			unlock = l.takeLocked(key)
			l.mu.Unlock()
			return unlock, nil
		}
		l.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (l *keyLock) takeLocked(key string) func() {
	if l.held == nil {
		l.held = make(map[string]chan struct{})
	}
	ch := make(chan struct{})
	l.held[key] = ch
	return func() {
		l.mu.Lock()
		delete(l.held, key)
		l.mu.Unlock()
		close(ch)
	}
}
