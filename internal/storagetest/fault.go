package storagetest

// A Fault makes operations of a Disk fail. Set its fields, then call Inject.
type Fault struct {
	Ops    Op    // kinds of operations that count
	N      int   // the first operation that fails, from 1
	Err    error // what it returns
	Sticky bool  // and all later ones fail as well, until Clear

	// Short makes a failing write store the first half of its bytes, in whole sectors.
	Short bool
	// Drop makes a failing sync lose all pages that were not durable, as
	// kernels do that mark a page clean after a write-back error: the file
	// falls back to its durable content.
	Drop bool

	seen, hits int // guarded by Disk.mu
}

type shortError struct{ err error }

func (e *shortError) Error() string { return e.err.Error() }

type dropError struct{ err error }

func (e *dropError) Error() string { return e.err.Error() }

// Inject adds f to the faults of d.
func (d *Disk) Inject(f *Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = append(d.faults, f)
}

// Clear removes all faults.
func (d *Disk) Clear() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.faults = nil
}

// Hits returns how many operations f made fail.
func (d *Disk) Hits(f *Fault) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return f.hits
}

// fault returns the error with which op must fail, or nil. d.mu is held.
func (d *Disk) fault(op Op) error {
	for _, f := range d.faults {
		if f.Ops&op == 0 {
			continue
		}
		f.seen++
		if f.seen < f.N || f.seen > f.N && !f.Sticky {
			continue
		}
		f.hits++
		switch {
		case f.Short && op&OpWrites != 0:
			return &shortError{f.Err}
		case f.Drop && op == OpSync:
			return &dropError{f.Err}
		}
		return f.Err
	}
	return nil
}

// counts holds what Count and Bytes return.
type counts struct {
	ops   [16]int
	bytes [16]int64
}

func (c *counts) add(op Op, n int) {
	for i := range c.ops {
		if op == 1<<i {
			c.ops[i]++
			c.bytes[i] += int64(n)
		}
	}
}

// Count returns how many operations of the kinds ops were called, failed ones included.
func (d *Disk) Count(ops Op) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for i, c := range d.counts.ops {
		if ops&(1<<i) != 0 {
			n += c
		}
	}
	return n
}

// Bytes returns how many bytes operations of the kinds ops were asked to move.
func (d *Disk) Bytes(ops Op) int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := int64(0)
	for i, c := range d.counts.bytes {
		if ops&(1<<i) != 0 {
			n += c
		}
	}
	return n
}

// ResetCounts sets all counts to 0.
func (d *Disk) ResetCounts() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.counts = counts{}
}
