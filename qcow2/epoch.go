package qcow2

import "sync/atomic"

// epochs tells when every request that was under way at some moment has ended,
// without a lock per request. A host cluster that a request may still read or
// write must not be given to another guest address: its freeing is stamped with
// the current epoch and takes effect two epochs later.
//
// Requests of epoch e count themselves in active[e&1]. The epoch can advance
// only when the counter of the one before is zero, so once current is e+2 every
// request that entered in e or earlier has left.
//
// Per-cluster request locks would do the same at a price per request; QEMU does
// neither and can hand out a cluster under a running request.
type epochs struct {
	current atomic.Uint64
	active  [2]struct {
		n atomic.Int64
		_ [56]byte // one cache line each
	}
	waiting atomic.Int32
	left    chan struct{} // capacity 1: some counter fell to zero while somebody waited
}

func newEpochs() *epochs { return &epochs{left: make(chan struct{}, 1)} }

// enter counts a request in and returns the slot that exit wants back.
func (e *epochs) enter() int {
	for {
		now := e.current.Load()
		slot := int(now & 1)
		e.active[slot].n.Add(1)
		if e.current.Load() == now {
			return slot
		}
		e.exit(slot)
	}
}

func (e *epochs) exit(slot int) {
	if e.active[slot].n.Add(-1) == 0 && e.waiting.Load() > 0 {
		select {
		case e.left <- struct{}{}:
		default:
		}
	}
}

// now returns the stamp for something that is freed at this moment.
func (e *epochs) now() uint64 { return e.current.Load() }

// passed reports whether every request that could know what was freed at stamp has left.
func (e *epochs) passed(stamp uint64) bool {
	if e.current.Load() >= stamp+2 {
		return true
	}
	e.tryAdvance()
	e.tryAdvance()
	return e.current.Load() >= stamp+2
}

func (e *epochs) tryAdvance() {
	now := e.current.Load()
	if e.active[(now+1)&1].n.Load() == 0 {
		e.current.CompareAndSwap(now, now+1)
	}
}

// synchronize waits until every request that is under way now has left. The
// caller must not be inside a request.
func (e *epochs) synchronize() {
	stamp := e.now()
	e.waiting.Add(1)
	defer e.waiting.Add(-1)
	for !e.passed(stamp) {
		<-e.left
	}
	select { // wake the next one who waits
	case e.left <- struct{}{}:
	default:
	}
}
