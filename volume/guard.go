package volume

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A Guard bounds what a pool of thin volumes promises and takes. All fields are
// shares of the space of the pool's file system; zero sets no bound.
type Guard struct {
	// Overcommit is how much the virtual sizes of all volumes may be together:
	// 1 promises no more than there is, 3 three times as much.
	Overcommit float64
	// WarnAt is the use of the file system from which the pool counts as degraded.
	WarnAt float64
	// RefuseAt is the use from which no volume is made or expanded any more.
	RefuseAt float64
	// StopAt is the use from which guest writes that need new clusters get
	// ENOSPC. The rest is for metadata, and for what others put beside the pool:
	// a file system that is full to the last byte cannot even forget a snapshot.
	StopAt float64
	// Pause is how long a guest's write may wait for space before it gets ENOSPC;
	// zero lets none wait. It needs StopAt. See Pool.AwaitRoom.
	Pause time.Duration
}

// Validate returns all that is wrong with g.
func (g Guard) Validate() error {
	var errs []error
	for _, share := range []struct {
		name  string
		value float64
	}{{"warn", g.WarnAt}, {"refuse", g.RefuseAt}, {"stop", g.StopAt}} {
		if math.IsNaN(share.value) || share.value < 0 || share.value > 1 {
			errs = append(errs, fmt.Errorf("%w: %s at %v of the pool: want 0 to 1", ErrInvalid, share.name, share.value))
		}
	}
	if math.IsNaN(g.Overcommit) || g.Overcommit < 0 || g.Overcommit > maxOvercommit {
		errs = append(errs, fmt.Errorf("%w: overcommit %v: want 0 to %d", ErrInvalid, g.Overcommit, maxOvercommit))
	}
	switch {
	case g.Pause < 0 || g.Pause > maxPause:
		errs = append(errs, fmt.Errorf("%w: pause of %s: want 0 to %s", ErrInvalid, g.Pause, maxPause))
	case g.Pause > 0 && g.StopAt == 0:
		errs = append(errs, fmt.Errorf("%w: pause of %s without a use at which writes stop", ErrInvalid, g.Pause))
	}
	return errors.Join(errs...)
}

const (
	maxOvercommit = 1 << 20
	// maxPause bounds how long the end of a pod may take: its processes cannot be
	// killed while a write of theirs waits.
	maxPause = 24 * time.Hour
)

// guardEvery is how often the use of the file system is looked at.
const guardEvery = time.Second

// guard is the state behind a Guard.
type guard struct {
	opts Guard
	// left is how many bytes guests may still allocate until the next look: so
	// however fast they write, they do not pass StopAt by more than others put
	// there meanwhile.
	left      atomic.Int64
	refused   atomic.Uint64 // writes
	refusedAt atomic.Int64  // the last one, Unix time in nanoseconds

	mu       sync.Mutex
	promised int64         // virtual sizes of volumes that are being made or expanded, bytes; guarded by mu
	reserved int64         // what volumes that are being made take at once, bytes; guarded by mu
	looked   chan struct{} // closed by the next look; nil when nobody waits for it; guarded by mu
}

// A Level says how full a pool is, in terms of its Guard.
type Level int

// The levels, each with all that is said of those before.
const (
	LevelOK     Level = iota
	LevelWarn         // someone should look
	LevelRefuse       // nothing new is made
	LevelStop         // writes that need space wait, or get ENOSPC
)

// level returns how full c is.
func (g Guard) level(c Capacity) Level {
	used := float64(c.Total - c.Available)
	level := LevelOK
	for i, share := range []float64{g.WarnAt, g.RefuseAt, g.StopAt} {
		if share > 0 && used >= share*float64(c.Total) {
			level = Level(i + 1)
		}
	}
	return level
}

// Level returns how full the pool is that has the capacity c.
func (p *Pool) Level(c Capacity) Level { return p.guard.opts.level(c) }

// stoppedFor is how long a refused write counts: just below StopAt small writes
// may pass where large ones do not.
const stoppedFor = time.Minute

// Stopped reports whether guest writes that need space wait or get ENOSPC, or
// did a moment ago.
func (p *Pool) Stopped() bool {
	g := &p.guard
	return g.opts.StopAt > 0 && (g.left.Load() <= 0 || time.Since(time.Unix(0, g.refusedAt.Load())) < stoppedFor)
}

// Refused returns how many guest writes were refused for want of space.
func (p *Pool) Refused() uint64 { return p.guard.refused.Load() }

// Pause returns how long a guest's write may wait for space, zero for not at all.
func (p *Pool) Pause() time.Duration { return p.guard.opts.Pause }

// Overcommit returns the bound of Guard.Overcommit, zero for none.
func (p *Pool) Overcommit() float64 { return p.guard.opts.Overcommit }

// Room returns how large a new volume may be, in a pool of capacity c.
func (p *Pool) Room(c Capacity) int64 {
	g := &p.guard
	if c.ReadOnly || g.opts.level(c) >= LevelRefuse {
		return 0
	}
	if g.opts.Overcommit == 0 {
		return c.Available
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return max(0, g.bound(c)-p.provisioned()-g.promised)
}

// bound returns how much may be promised in all, in bytes.
func (g *guard) bound(c Capacity) int64 {
	if bound := g.opts.Overcommit * float64(c.Total); bound < math.MaxInt64 {
		return int64(bound)
	}
	return math.MaxInt64
}

// reserve counts n bytes that are about to be taken until kept is called, and returns
// how many there are with those of others.
func (g *guard) reserve(n int64) (sum int64, kept func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.reserved += n
	return g.reserved, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.reserved -= n
	}
}

// reservable returns how many bytes of c can be taken at once.
func (g Guard) reservable(c Capacity) int64 {
	kept := 0.0
	for _, share := range []float64{g.RefuseAt, g.StopAt} {
		if share > 0 {
			kept = max(kept, 1-share)
		}
	}
	return max(0, c.Available-int64(kept*float64(c.Total)))
}

// provisioned returns the virtual sizes of all volumes that users see, together.
func (p *Pool) provisioned() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	var sum int64
	for _, e := range p.volumes {
		if e.rec != nil && !e.rec.Deleted {
			sum += e.rec.Size
		}
	}
	return sum
}

// promise takes n bytes of what may be promised, or returns ErrNoSpace. The
// caller calls kept when the volume is in the index, or will not be.
func (p *Pool) promise(n int64) (kept func(), err error) {
	g := &p.guard
	c, err := p.Capacity()
	if err != nil {
		return nil, err
	}
	if c.ReadOnly {
		return nil, fmt.Errorf("%w: the file system of %q is read-only; look why in the kernel's log, mend it and mount it for writing", ErrNoSpace, p.path)
	}
	if g.opts.Overcommit == 0 && g.opts.RefuseAt == 0 {
		return func() {}, nil
	}
	if g.opts.level(c) >= LevelRefuse {
		return nil, fmt.Errorf("%w: %d of %d bytes are left in %q, which takes no new volumes from %g %% use on; free space or add some",
			ErrNoSpace, c.Available, c.Total, p.path, 100*g.opts.RefuseAt)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.opts.Overcommit > 0 {
		if room := g.bound(c) - p.provisioned() - g.promised; n > room {
			return nil, fmt.Errorf("%w: %d bytes more would promise more than %g times the %d bytes of %q; there is room for %d: delete volumes, add space, or raise the bound",
				ErrNoSpace, n, g.opts.Overcommit, c.Total, p.path, max(0, room))
		}
	}
	g.promised += n
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.promised -= n
	}), nil
}

// admit is asked before a guest's write allocates n bytes. See qcow2.Options.Admit.
func (p *Pool) admit(n int64) error {
	if p.guard.opts.StopAt == 0 || p.guard.left.Add(-n) >= 0 {
		return nil
	}
	if p.guard.opts.Pause == 0 { // else it waits, see AwaitRoom
		p.guard.refused.Add(1)
	}
	p.guard.refusedAt.Store(time.Now().UnixNano())
	return fmt.Errorf("pool %q is more than %g %% full: %w", p.path, 100*p.guard.opts.StopAt, unix.ENOSPC)
}

// AwaitRoom waits, on behalf of a guest's write that got ENOSPC, until a look at
// the file system finds room; then the write is tried again, and may have to
// wait again, because others have waited as well. When ctx or the pool ends it
// returns an error: if the write then gets ENOSPC, Refuse is to be called. The caller
// holds nothing that freeing space needs: of the image it has no lock.
func (p *Pool) AwaitRoom(ctx context.Context) error {
	for {
		select {
		case <-p.guard.nextLook():
			if p.guard.left.Load() > 0 {
				return nil
			}
			continue
		case <-ctx.Done():
		case <-p.ctx.Done():
		}
		return errors.Join(ctx.Err(), p.ctx.Err())
	}
}

// Refuse counts a guest's write that has waited for room in vain.
func (p *Pool) Refuse() { p.guard.refused.Add(1) }

// nextLook returns a channel that the next look closes.
func (g *guard) nextLook() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.looked == nil {
		g.looked = make(chan struct{})
	}
	return g.looked
}

// look sets what guests may allocate until the next look.
func (p *Pool) look() error {
	if p.guard.opts.StopAt == 0 {
		return nil
	}
	c, err := p.Capacity()
	if err != nil {
		return err
	}
	p.guard.left.Store(int64(p.guard.opts.StopAt*float64(c.Total)) - (c.Total - c.Available))
	p.guard.mu.Lock()
	defer p.guard.mu.Unlock()
	if p.guard.looked != nil {
		close(p.guard.looked)
		p.guard.looked = nil
	}
	return nil
}

// Watch looks at the use of the file system now and then, until ctx or the
// pool ends. Without it the first look, at Open, decides for ever.
func (p *Pool) Watch(ctx context.Context) {
	if p.guard.opts.StopAt == 0 {
		return
	}
	tick := time.NewTicker(guardEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.ctx.Done():
			return
		case <-tick.C:
			// A file system that cannot be asked fails the writes itself.
			_ = p.look()
		}
	}
}
