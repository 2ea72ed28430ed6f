package convert

import (
	"context"
	"sync"
)

// parallel gives what produce emits to workers goroutines that call do. The
// first error of either ends the work and is returned. All goroutines have
// ended then.
func parallel[T any](ctx context.Context, workers int,
	produce func(ctx context.Context, emit func(T) error) error,
	do func(ctx context.Context, task T) error,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	tasks := make(chan T, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() { // ends when tasks is closed
			for t := range tasks {
				if ctx.Err() != nil {
					continue // drain
				}
				if err := do(ctx, t); err != nil {
					cancel(err)
				}
			}
		})
	}
	err := produce(ctx, func(t T) error {
		select {
		case tasks <- t:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(tasks)
	if err != nil {
		cancel(err)
	}
	wg.Wait()
	return context.Cause(ctx)
}

// A turn lets tasks pass one after another by their number.
type turn struct {
	mu      sync.Mutex
	changed sync.Cond
	next    int64 // guarded by mu
}

// wait returns nil when it is seq's turn.
func (t *turn) wait(ctx context.Context, seq int64) error {
	defer context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.changed.Broadcast()
	})()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.next != seq {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.changed.Wait()
	}
	return nil
}

// done gives the turn to the next task.
func (t *turn) done() {
	t.mu.Lock()
	t.next++
	t.mu.Unlock()
	t.changed.Broadcast()
}

// A progress counts bytes and reports them.
type progress struct {
	mu     sync.Mutex
	bytes  int64 // guarded by mu
	report func(int64)
}

// add holds mu over the report, so that reports come one at a time and ascend.
func (p *progress) add(n int64) {
	if p.report == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.bytes += n
	p.report(p.bytes)
}
