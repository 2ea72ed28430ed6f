package cache

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"
)

// A File is what the cache reads tables from and writes them back to. Its
// methods may be called from many goroutines at once.
type File interface {
	// ReadAt reads len(p) bytes at off; at the end of the file it returns fewer
	// bytes and io.EOF. What is missing reads as zeroes.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes all of p at off, or returns an error.
	WriteAt(p []byte, off int64) (int, error)
	// Datasync makes durable what WriteAt returned for before its call.
	Datasync() error
}

// Options says how a Cache is made. The zero value is usable.
type Options struct {
	// Bytes is the budget for tables. It is rounded up to whole sets of eight
	// 4096-byte slots. Default 32 MiB, at least 32 KiB, at most 1 TiB.
	// An arena with dirty tables of a predecessor keeps its size.
	Bytes int64
	// Path names the arena file, on a tmpfs. "" is anonymous memory.
	Path string
	// Generation is that of the arena's users: an arena file of another one is
	// refused. A caller changes it when what the arena holds must not be used any
	// more, for example after it served the images without this arena.
	Generation uint64
	// Fresh discards what a predecessor left in the arena file.
	Fresh bool
	// OnStore, if not nil, is called before each store into the arena that a
	// successor can see, by the goroutine that stores, possibly with locks held.
	// It is for tests that enumerate the states in which a process can be killed;
	// with it, no call returns while a pass that it has waited for still runs.
	OnStore func()
	// ClaimWait is how long after New a Get or Create waits for the images that a
	// predecessor had open, where their dirty tables leave it no room: a process that opens
	// many images, and serves each from then on, does not fail requests to the first
	// because of the last. Zero means ErrUnclaimed at once.
	ClaimWait time.Duration
	// Lock locks the memory of the arena, so that it is never paged out.
	Lock bool
}

const (
	defaultBytes = 32 << 20
	minBytes     = ways * slotBytes
	maxBytes     = 1 << 40
)

func (o Options) withDefaults() Options {
	if o.Bytes == 0 {
		o.Bytes = defaultBytes
	}
	return o
}

func (o Options) validate() error {
	if o.Bytes < minBytes || o.Bytes > maxBytes {
		return fmt.Errorf("%w: budget of %d bytes: it must be from %d to %d", ErrInvalid, o.Bytes, minBytes, int64(maxBytes))
	}
	return nil
}

// Dirty tables, as shares of all slots, at which the background writer starts
// and stops. At a quarter, one set in 65,000 has no clean way.
const (
	dirtyStart = 4 // 1/4
	dirtyStop  = 8 // 1/8
)

// A Cache holds tables of all images of a process within one budget.
//
// It is set-associative: a hash of image and offset chooses a set, and a table
// is in one of the set's ways or not in the cache. So every operation costs the
// same whatever the budget is, and no two sets share a lock.
type Cache struct {
	arena *arena
	marks marks
	sets  []set
	slots []slot

	dirty atomic.Int64  // dirty tables of the handles that have not failed
	kick  chan struct{} // capacity 1: wakes Run
	byID  atomic.Pointer[[]*Handle]

	mu      sync.Mutex
	handles []*Handle // by number; [0] is nil; guarded by mu, byID is its copy
	closed  bool      // guarded by mu

	unclaimed map[[16]byte]*Handle // those of handles that wait for their image; guarded by mu

	claims   atomic.Pointer[chan struct{}] // closed and replaced when an image is claimed, or forgotten
	patience time.Time                     // when ClaimWait ends
}

// New returns a cache: an empty one, or, with the Path of an arena whose process
// was killed, one that holds the dirty tables of that process. Those wait for
// their images to be opened (see Unclaimed).
//
// New returns ErrInUse while another process has the arena, and an *ArenaError
// for an arena that must not be used: of another layout, boot or generation,
// truncated or damaged. It starts nothing; see Run.
func New(o Options) (*Cache, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	slots := int((o.Bytes+ways*slotBytes-1)/(ways*slotBytes)) * ways
	a, left, err := o.arena(slots)
	if err != nil {
		return nil, err
	}
	if o.Lock {
		if err := a.lock(); err != nil {
			return nil, errors.Join(err, a.unmap())
		}
	}
	a.onStore = o.OnStore
	c := &Cache{
		arena:     a,
		sets:      make([]set, a.slots/ways),
		slots:     make([]slot, a.slots),
		kick:      make(chan struct{}, 1),
		handles:   make([]*Handle, 1),
		unclaimed: map[[16]byte]*Handle{},
	}
	c.marks.init(a)
	c.publishHandlesLocked()
	c.claims.Store(new(make(chan struct{})))
	c.patience = time.Now().Add(o.ClaimWait)
	if err := c.adopt(left); err != nil {
		return nil, errors.Join(&ArenaError{Path: o.Path, Msg: err.Error()}, a.unmap())
	}
	return c, nil
}

// arena maps the arena, and returns what a predecessor left in it.
func (o Options) arena(slots int) (*arena, []entry, error) {
	if o.Path == "" {
		a, err := mapAnonymous(slots)
		return a, nil, err
	}
	return mapFile(o.Path, slots, o.Generation, o.Fresh)
}

// Close releases the memory. It returns ErrInUse, and does nothing, while
// handles are open.
func (c *Cache) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	if n := c.openLocked(); n > 0 {
		return fmt.Errorf("%w: %d open handles", ErrInUse, n)
	}
	c.closed = true
	if len(c.unclaimed) == 0 && len(c.marks.all()) == 0 {
		c.marks.reset() // of images that found no mark of their own
	}
	return c.arena.unmap()
}

func (c *Cache) openLocked() int {
	n := 0
	for _, h := range c.handles {
		if h != nil && !h.unclaimed.Load() {
			n++
		}
	}
	return n
}

// publishHandlesLocked makes the handles findable without mu.
func (c *Cache) publishHandlesLocked() {
	hs := append([]*Handle(nil), c.handles...)
	c.byID.Store(&hs)
}

// owner returns the handle of a key that is in a set, whose mu is held: a
// handle leaves the cache only when no set has a key of it.
func (c *Cache) owner(k key) *Handle { return (*c.byID.Load())[k.handle()] }

// Run writes back dirty tables, many at once, before they are in the way: it
// starts when a quarter of the slots is dirty, and goes on, image by image, until an
// eighth is. It returns when ctx is done, with its cause.
//
// The cache also works without it; then a Get that finds its set full of dirty
// tables waits for a pass more often. An error of a pass stays on its handle.
func (c *Cache) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.kick:
		}
		for c.dirty.Load() > int64(len(c.slots)/dirtyStop) && ctx.Err() == nil {
			h := c.dirtiest()
			if h == nil {
				break
			}
			_ = h.WriteBack() // sticky on h
		}
	}
}

// dirtiest returns the handle with the most dirty tables, of those that can be
// written back; nil if there is none.
func (c *Cache) dirtiest() *Handle {
	var most *Handle
	n := 0
	for _, h := range *c.byID.Load() {
		if h == nil || !h.cleanable() {
			continue
		}
		if d := h.DirtyTables(); d > n {
			most, n = h, d
		}
	}
	return most
}

// addDirty counts dirty tables, and wakes Run when there are many.
func (c *Cache) addDirty(n int) {
	if d := c.dirty.Add(int64(n)); n > 0 && d > int64(len(c.slots)/dirtyStart) {
		select {
		case c.kick <- struct{}{}:
		default: // it is awake
		}
	}
}

// set returns the set of a table of the handle with the given seed.
func (c *Cache) set(seed uint64, off int64) (*set, int) {
	i := setOf(seed, off, len(c.sets))
	return &c.sets[i], i
}

// setOf returns the number, of sets, of the set of a table.
func setOf(seed uint64, off int64, sets int) int {
	i, _ := bits.Mul64(mix(seed+uint64(off)>>9), uint64(sets))
	return int(i)
}

// seedOf returns the seed of the hash for the image with a given identity.
func seedOf(id [16]byte) uint64 {
	lo, hi := idWords(id)
	return mix(mix(lo) ^ hi)
}
