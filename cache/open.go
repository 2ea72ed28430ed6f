package cache

import (
	"errors"
	"fmt"
	"slices"
	"sync"
)

// A Class orders tables within a pass: of the tables that are dirty when a pass
// starts, those of class 0 are durable before the first of class 1 is written,
// and so on. See "Classes and edges" in the package comment.
type Class uint8

// maxClasses is the number of classes that a state word can hold.
const maxClasses = 4

// HandleOptions says how an image uses the cache.
type HandleOptions struct {
	// ID is the identity of the image: what a successor process finds its dirty
	// tables by. The zero ID means that nobody takes them over; any number of
	// handles may have it. Another ID is open once.
	ID [16]byte
	// SliceBytes is the size of a table slice: 512, 1024, 2048 or 4096.
	// Default 4096.
	SliceBytes int
	// Classes is the number of classes in use, from 1 to 4. Default 1.
	Classes int
	// OnWriteBack, if not nil, is called after passes that succeeded, with the
	// value of Done. Calls come one after another, from a goroutine of the
	// handle that holds no lock, and done grows from call to call; passes that
	// end during a call share the next one. It may use the handle, but must not
	// wait for Close or Discard.
	OnWriteBack func(done uint64)
}

func (o HandleOptions) withDefaults() HandleOptions {
	if o.SliceBytes == 0 {
		o.SliceBytes = slotBytes
	}
	if o.Classes == 0 {
		o.Classes = 1
	}
	return o
}

func (o HandleOptions) validate() error {
	var errs []error
	if !validSlice(uint64(o.SliceBytes)) {
		errs = append(errs, fmt.Errorf("%w: slice of %d bytes: it must be a power of two from 512 to %d", ErrInvalid, o.SliceBytes, slotBytes))
	}
	if o.Classes < 1 || o.Classes > maxClasses {
		errs = append(errs, fmt.Errorf("%w: %d classes: it must be from 1 to %d", ErrInvalid, o.Classes, maxClasses))
	}
	return errors.Join(errs...)
}

func validSlice(n uint64) bool { return n >= 512 && n <= slotBytes && n&(n-1) == 0 }

// Open returns a handle for the tables of f. The cache does not close f. If a
// predecessor left dirty tables of the image with this ID in the arena, the
// handle has them (see Adopted), and the caller must use the same SliceBytes and
// at least the same Classes, or Forget them first.
//
// Open returns ErrInUse if the ID has an open handle.
func (c *Cache) Open(f File, o HandleOptions) (*Handle, error) {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, ErrClosed
	}
	if h := c.unclaimed[o.ID]; h != nil {
		if err := c.claimLocked(h, f, o); err != nil {
			return nil, err
		}
		h.mark = c.markOf(o.ID)
		return h, nil
	}
	if o.ID != [16]byte{} && c.isOpenLocked(o.ID) {
		return nil, fmt.Errorf("%w: image %x has a handle", ErrInUse, o.ID)
	}
	h := newHandle(c, f, o)
	h.mark = c.markOf(o.ID)
	if err := c.addLocked(h); err != nil {
		return nil, err
	}
	return h, nil
}

func (c *Cache) markOf(id [16]byte) markKind {
	if id == [16]byte{} {
		return markNone
	}
	return c.marks.of(id)
}

func newHandle(c *Cache, f File, o HandleOptions) *Handle {
	h := &Handle{
		c:        c,
		f:        f,
		o:        o,
		misfit:   ^uint64(1<<offsetBits-1) | uint64(o.SliceBytes-1),
		released: make(chan struct{}),
	}
	h.cond, h.quiet = sync.NewCond(&h.mu), sync.NewCond(&h.mu)
	h.ordered.Store(true) // what a predecessor wrote past its cache
	h.clean.init()
	for i := range h.dirty {
		h.dirty[i].init()
	}
	return h
}

// addLocked gives h a number.
func (c *Cache) addLocked(h *Handle) error {
	h.number = slices.Index(c.handles[1:], nil) + 1
	if h.number == 0 {
		if len(c.handles) > maxHandles {
			return fmt.Errorf("%w: all %d handles", ErrInUse, maxHandles)
		}
		h.number = len(c.handles)
		c.handles = append(c.handles, nil)
	}
	h.seed = mix(uint64(h.number))
	if h.o.ID != [16]byte{} {
		// A successor must find the tables of the image in the same sets,
		// whatever number its handle has.
		h.seed = seedOf(h.o.ID)
	}
	c.handles[h.number] = h
	c.publishHandlesLocked()
	return nil
}

// Close writes back what is dirty, forgets all tables and releases the handle.
// The handle is released in any case; if the error is not nil, changes are lost.
//
// Preconditions: no table of the handle is pinned for good, and nobody changes
// tables any more. Close waits for a running OnWriteBack.
func (h *Handle) Close() error {
	var err error
	for err == nil && h.DirtyTables() > 0 {
		err = h.WriteBack()
	}
	return errors.Join(err, h.Discard())
}

// Discard releases the handle without writing. Preconditions: as for Close.
func (h *Handle) Discard() error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		<-h.released
		return nil
	}
	if h.failure.Load() != nil {
		h.markLocked(markGone) // its tables go now, the mark goes after them
	}
	h.closed = true
	h.awaitQuietLocked()
	h.emptyAtticLocked()
	h.cond.Broadcast()
	h.mu.Unlock()

	for {
		h.mu.Lock()
		i := h.anyLocked()
		var off int64
		if i != noSlot {
			off = h.c.slots[i].off
		}
		h.mu.Unlock()
		if i == noSlot {
			break
		}
		h.Drop(off)
	}
	h.wg.Wait()

	c := h.c
	if h.o.ID != [16]byte{} {
		c.marks.clear(h.o.ID)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.handles[h.number] = nil
	c.publishHandlesLocked()
	close(h.released)
	return nil
}

// awaitQuietLocked waits until no pass and no load is under way.
func (h *Handle) awaitQuietLocked() {
	for h.running || h.loads > 0 {
		if h.running {
			h.cond.Wait()
		} else {
			h.quiet.Wait()
		}
	}
}

// Abandon undoes Open. What a predecessor left, with what has changed since,
// waits for Open or Forget again, as far as it was not written back; that the image
// has failed is noted as ever. Preconditions: as for Close.
func (h *Handle) Abandon() error {
	h.mu.Lock()
	h.awaitQuietLocked()
	left := !h.closed && (h.DirtyTables() > 0 || h.mark != markNone || h.failure.Load() != nil)
	h.mu.Unlock()
	if !left || h.o.ID == [16]byte{} {
		return h.Discard()
	}
	h.wg.Wait()

	c := h.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if h.failure.Swap(nil) == nil {
		c.addDirty(-h.DirtyTables())
	}
	h.adopted = h.DirtyTables()
	h.unclaimed.Store(true)
	c.unclaimed[h.o.ID] = h
	return nil
}

// anyLocked returns a slot of h, noSlot if it has none. No pass is running.
func (h *Handle) anyLocked() slotIndex {
	// Higher classes first: what a successor finds if this process is killed
	// here has no table without those it depends on.
	for c := maxClasses - 1; c >= 0; c-- {
		if i := h.dirty[c].head; i != noSlot {
			return i
		}
	}
	return h.clean.head
}
