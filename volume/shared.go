package volume

import (
	"context"
	"sync"
)

// A shared table opens a thing once for all who want it and closes it when the
// last has let go. Opening goes on when the one who asked goes away: the next
// one finds it further.
type shared[K comparable, V any] struct {
	ctx     context.Context // of the opening; ends with the pool
	open    func(context.Context, K) (V, error)
	shut    func(K, V) error
	workers *sync.WaitGroup // counts the openers

	mu    sync.Mutex
	items map[K]*sharedItem[V] // guarded by mu
}

type sharedItem[V any] struct {
	ready  chan struct{} // closed when value and err are set
	value  V
	err    error
	refs   int           // guarded by shared.mu
	closed chan struct{} // not nil once closing; closed when closed; guarded by shared.mu
}

// acquire returns the open thing k. Each success is paired with a release.
func (s *shared[K, V]) acquire(ctx context.Context, k K) (V, error) {
	for {
		item, closing := s.join(k)
		if closing == nil {
			return s.await(ctx, k, item)
		}
		select {
		case <-closing:
		case <-ctx.Done():
			var none V
			return none, ctx.Err()
		}
	}
}

// join counts one more user of k and starts to open it if it is the first. It
// does not wait. When k is just being closed it returns a channel to wait for.
func (s *shared[K, V]) join(k K) (*sharedItem[V], <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	item := s.items[k]
	if item != nil && item.closed != nil {
		return nil, item.closed
	}
	if item == nil {
		item = &sharedItem[V]{ready: make(chan struct{})}
		if s.items == nil {
			s.items = make(map[K]*sharedItem[V])
		}
		s.items[k] = item
		s.workers.Add(1)
		go func() { // ends when the opening does, at the latest when s.ctx ends
			defer s.workers.Done()
			item.value, item.err = s.open(s.ctx, k)
			close(item.ready)
		}()
	}
	item.refs++
	return item, nil
}

// await waits until a joined item is open, and lets go of it on failure.
func (s *shared[K, V]) await(ctx context.Context, k K, item *sharedItem[V]) (V, error) {
	var none V
	select {
	case <-item.ready:
	case <-ctx.Done():
		s.workers.Add(1)
		go func() { // ends when the opening does
			defer s.workers.Done()
			<-item.ready
			s.release(k)
		}()
		return none, ctx.Err()
	}
	if item.err != nil {
		s.release(k)
		return none, item.err
	}
	return item.value, nil
}

// release counts one user less of k and closes it when none is left.
func (s *shared[K, V]) release(k K) error {
	s.mu.Lock()
	item := s.items[k]
	item.refs--
	if item.refs > 0 {
		s.mu.Unlock()
		return nil
	}
	if item.err != nil {
		delete(s.items, k)
		s.mu.Unlock()
		return nil
	}
	item.closed = make(chan struct{})
	s.mu.Unlock()

	err := s.shut(k, item.value)

	s.mu.Lock()
	delete(s.items, k)
	s.mu.Unlock()
	close(item.closed)
	return err
}

// peek returns the value of k if it is open, without a hold on it.
func (s *shared[K, V]) peek(k K) (V, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var none V
	item := s.items[k]
	if item == nil || item.closed != nil {
		return none, false
	}
	select {
	case <-item.ready:
		return item.value, item.err == nil
	default:
		return none, false
	}
}

// inUse reports whether k is open, opening or closing.
func (s *shared[K, V]) inUse(k K) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.items[k] != nil
}

// keys returns what is open.
func (s *shared[K, V]) keys() []K {
	s.mu.Lock()
	defer s.mu.Unlock()
	var keys []K
	for k, item := range s.items {
		if item.err == nil {
			keys = append(keys, k)
		}
	}
	return keys
}

// closeNow closes k whoever uses it. Nothing may be opening any more.
func (s *shared[K, V]) closeNow(k K) error {
	s.mu.Lock()
	item := s.items[k]
	if item == nil {
		s.mu.Unlock()
		return nil
	}
	delete(s.items, k)
	s.mu.Unlock()
	return s.shut(k, item.value)
}
