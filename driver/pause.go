package driver

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/nbdexport"
)

// A pausing backend lets writes that a full pool has no space for wait until
// there is some, as long as volume.Guard.Pause allows. It does so outside of
// the image, whose other users go on: who frees space needs them. A write that
// failed may be done again whole: its range held old or new bytes.
//
// The kernel waits with it: neither nbd, whose requests have no timeout while
// their connection lives, nor FUSE gives a request up. Only so many requests
// of a device are served at a time, so those behind it may wait as well, reads
// too. And a process that waits for the kernel cannot be killed, which is why the
// wait is bounded.
type pausing struct {
	*imagebackend.Backend
	pool    roomy
	waiting atomic.Int64 // writes

	mu  sync.Mutex
	ctx context.Context // ends all waits, by giveUp or leave; guarded by mu
	end context.CancelCauseFunc
}

// roomy is the part of a *volume.Pool that pauses need.
type roomy interface {
	Pause() time.Duration
	AwaitRoom(ctx context.Context) error
	Refuse()
}

func newPausing(b *imagebackend.Backend, pool roomy) *pausing {
	p := &pausing{Backend: b, pool: pool}
	p.resume()
	return p
}

// resume lets later writes wait, after giveUp too: for when the volume is used on.
func (p *pausing) resume() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ctx, p.end = context.WithCancelCause(context.Background())
}

// giveUp makes the writes that wait fail with ENOSPC, and all later ones that
// would until resume: for when somebody must not wait for them.
func (p *pausing) giveUp() { p.stop(nil) }

// leave leaves the writes that wait, and all later ones that would, to the next
// process, which waits anew: for when the device is left, and survives that.
func (p *pausing) leave() { p.stop(nbdexport.ErrUnanswered) }

func (p *pausing) stop(cause error) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.end(cause)
}

// waits returns what ends the waits that begin now.
func (p *pausing) waits() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ctx
}

// paused returns how many writes wait.
func (p *pausing) paused() int64 {
	if p == nil {
		return 0
	}
	return p.waiting.Load()
}

// WriteAt implements nbdexport.Backend.
func (p *pausing) WriteAt(b []byte, off int64) (int, error) {
	n, err := p.Backend.WriteAt(b, off)
	if err == nil {
		return n, nil
	}
	err = p.retry(err, func() error { _, err := p.Backend.WriteAt(b, off); return err })
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// WriteZeroes implements nbdexport.Backend.
func (p *pausing) WriteZeroes(off, n int64, unmap bool) error {
	err := p.Backend.WriteZeroes(off, n, unmap)
	if err == nil {
		return nil
	}
	return p.retry(err, func() error { return p.Backend.WriteZeroes(off, n, unmap) })
}

// WriteZeroesFast implements nbdexport.FastZeroer.
func (p *pausing) WriteZeroesFast(off, n int64, unmap bool) error {
	err := p.Backend.WriteZeroesFast(off, n, unmap)
	if err == nil {
		return nil
	}
	return p.retry(err, func() error { return p.Backend.WriteZeroesFast(off, n, unmap) })
}

// retry repeats a write that failed with err for as long as space may come.
func (p *pausing) retry(err error, write func() error) error {
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	p.waiting.Add(1)
	defer p.waiting.Add(-1)
	ctx, cancel := context.WithTimeout(p.waits(), p.pool.Pause())
	defer cancel()
	for errors.Is(err, syscall.ENOSPC) && p.pool.AwaitRoom(ctx) == nil {
		err = write()
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	if errors.Is(context.Cause(ctx), nbdexport.ErrUnanswered) {
		return nbdexport.ErrUnanswered
	}
	p.pool.Refuse()
	return err
}
