package qcow2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// allocator finds free host clusters of an image. In order of preference:
//
//  1. runs that were freed while the image has been open,
//  2. free clusters of earlier times, found by a cursor that looks at one slice
//     of refcounts per allocation until it has seen the whole file,
//  3. the tail: clusters that lay beyond the end of the file when it was opened.
//
// So an allocation costs the same however large or full the image is. A first
// fit from the lowest free cluster, as in QEMU, reads all refcount blocks of a
// full image again whenever something low was freed.
//
// Clusters of the tail have never been written: they read as zeroes, and copy on
// write may skip what is zero.
//
// Of the tail some are taken ahead, with refcount 1 before anything refers to
// them: most writes that allocate find refcounts that are durable already, so
// that a flush after them has nothing to order and costs one sync, where E2 costs two. A
// crash leaks them until the image is opened again; Close and Check give them back.
type allocator struct {
	mu sync.Mutex // the fields below; never held over I/O

	reftable    atomic.Pointer[[]uint64] // the refcount table; never changed, only replaced, under mu
	reftableOff HostOffset               // guarded by mu
	freed       []run                    // guarded by mu; at most maxFreed runs
	low, lowEnd hostCluster
	tail        hostCluster // guarded by mu, as low and lowEnd
	ahead       run         // taken ahead; guarded by mu

	// growMu serialises new refcount blocks and tables, and growth of the host
	// file. It is held over their I/O: who waits for it needs what it makes.
	growMu sync.Mutex
	// refcounts guard the refcounts in the cache, each those of the slices that
	// it is chosen for by refcountLock: who sweeps the image and who allocates
	// seldom meet in one.
	refcounts [refcountLocks]sync.Mutex
	fileEnd   atomic.Int64 // size of the host file; changed under growMu
}

// A run is a range of host clusters.
type run struct {
	first hostCluster
	n     int64
}

const (
	refcountLocks = 64

	aheadClusters = 64       // of the tail that are taken ahead
	maxFreed      = 4096     // runs that are remembered; more are found by the cursor
	fileStepMin   = 1 << 20  // bytes by which a host file grows at least, if not by what is taken ahead …
	fileStepMax   = 64 << 20 // … and at most
	fileStepShare = 8        // else by an eighth of its size
)

func (a *allocator) init(g *geometry, reftableOff HostOffset, reftable []uint64, fileSize int64) {
	a.reftable.Store(&reftable)
	a.reftableOff = reftableOff
	a.tail = min(hostCluster(g.clusters(fileSize)), g.hostCluster(maxHostOffset))
	a.low, a.lowEnd = 0, a.tail
	a.fileEnd.Store(fileSize)
}

// table returns the entries of the refcount table that is in force.
func (a *allocator) table() []uint64 {
	if p := a.reftable.Load(); p != nil {
		return *p
	}
	return nil // opened read-only
}

// refcountLock returns the lock of the slice of refcounts at off.
func (a *allocator) refcountLock(g *geometry, off HostOffset) *sync.Mutex {
	return &a.refcounts[g.sliceNumber(off)%refcountLocks]
}

// A take is the outcome of one look for free clusters, with allocator.mu held.
type take struct {
	first hostCluster
	n     int64 // clusters taken, their refcounts are 1; 0: none
	fresh bool  // never written: they read as zeroes

	next    hostCluster // with n 0: the first cluster that was not looked at
	missing HostOffset  // with n 0: the slice of refcounts to load into the cache first, 0 if none
	noBlock bool        // with n 0: the tail has no refcount block
}

// alloc allocates up to want contiguous clusters, at least one, with refcount 1.
// Fresh clusters have never been written and read as zeroes.
func (im *Image) alloc(want int64) (first hostCluster, n int64, fresh bool, err error) {
	a := &im.allocator
	for {
		a.mu.Lock()
		t, err := im.takeLocked(want)
		table, _ := im.geo.refblockIndex(a.tail)
		a.mu.Unlock()
		switch {
		case err != nil:
		case t.n > 0:
			if err := im.checkUnguarded("cluster of refcount 0", im.geo.hostOffset(t.first), t.n*im.geo.clusterSize); err != nil {
				// Other refcounts may be wrong, too: nothing is allocated any more.
				return 0, 0, false, im.fail(err)
			}
			// Clusters below the tail may lie beyond the end of the file, too,
			// when an extension failed.
			err = im.extendFile(int64(im.geo.hostOffset(t.first)) + t.n*im.geo.clusterSize)
			if err == nil {
				return t.first, t.n, t.fresh, nil
			}
			im.free(t.first, t.n)
		case t.missing != 0:
			err = im.loadTable(classRefblock, t.missing)
		case t.noBlock:
			err = im.addRefblock(table)
		}
		if err != nil {
			return 0, 0, false, err
		}
	}
}

// allocData is alloc for clusters of data, if they are admitted.
func (im *Image) allocData(want int64) (first hostCluster, n int64, fresh bool, err error) {
	if admit := im.opts.Admit; admit != nil {
		if err := admit(want << im.geo.clusterBits); err != nil {
			return 0, 0, false, fmt.Errorf("qcow2: allocate %d clusters: %w", want, err)
		}
	}
	return im.alloc(want)
}

// takeLocked is one try of alloc. Preconditions: a.mu is held.
func (im *Image) takeLocked(want int64) (take, error) {
	if t, err := im.takeFreed(want); err != nil || t.n > 0 || t.missing != 0 {
		return t, err
	}
	if t, err := im.takeLow(want); err != nil || t.n > 0 || t.missing != 0 {
		return t, err
	}
	return im.takeTail(want)
}

// errTooLong: entries of tables cannot say where another cluster is.
var errTooLong = fmt.Errorf("%w: the image file would pass %d bytes", ErrTooLarge, uint64(maxHostOffset))

// takeTail takes from what was taken ahead of the tail, and takes more ahead when
// that is less than want. Preconditions: a.mu is held.
func (im *Image) takeTail(want int64) (take, error) {
	a, g := &im.allocator, &im.geo
	for a.ahead.n < want {
		end := a.ahead.first + hostCluster(a.ahead.n)
		table, _ := g.refblockIndex(a.tail)
		tooLong := a.tail >= g.hostCluster(maxHostOffset)
		if tooLong || table >= len(a.table()) || a.table()[table] == 0 {
			if a.ahead.n > 0 {
				break
			}
			if tooLong {
				return take{}, errTooLong
			}
			return take{noBlock: true}, nil
		}
		t, err := im.takeFree(a.tail, a.tail+hostCluster(1)<<g.refblockBits, want-a.ahead.n+aheadClusters)
		if err != nil || t.missing != 0 && a.ahead.n == 0 {
			return t, err
		}
		if t.missing != 0 {
			break
		}
		a.tail = t.next
		switch {
		case t.n == 0:
		case a.ahead.n == 0:
			a.ahead = run{t.first, t.n}
		case t.first == end:
			a.ahead.n += t.n
		default: // the rest comes first
			rest := a.ahead
			a.ahead = run{t.first, t.n}
			return take{first: rest.first, n: rest.n, fresh: true}, nil
		}
	}
	t := take{first: a.ahead.first, n: min(want, a.ahead.n), fresh: true}
	a.ahead.first += hostCluster(t.n)
	a.ahead.n -= t.n
	return t, nil
}

// returnAhead gives back what was taken ahead. Preconditions: no request that
// allocates is under way.
func (im *Image) returnAhead() error {
	a := &im.allocator
	a.mu.Lock()
	r := a.ahead
	a.ahead = run{}
	atTail := r.first+hostCluster(r.n) == a.tail
	if r.n > 0 && atTail {
		a.tail = r.first
	}
	a.mu.Unlock()
	if r.n == 0 {
		return nil
	}
	err := im.addRefcounts(r.first, r.n, -1)
	if err == nil && !atTail {
		a.mu.Lock()
		a.rememberFreed(r.first, r.n)
		a.mu.Unlock()
	}
	return err
}

// takeFreed takes from the runs that were freed lately. Preconditions: a.mu is held.
func (im *Image) takeFreed(want int64) (take, error) {
	a := &im.allocator
	for len(a.freed) > 0 {
		r := &a.freed[len(a.freed)-1]
		end := r.first + hostCluster(r.n)
		t, err := im.takeFree(r.first, end, want)
		if err != nil || t.missing != 0 {
			return t, err
		}
		if t.next >= end {
			a.freed = a.freed[:len(a.freed)-1]
		} else {
			r.first, r.n = t.next, int64(end-t.next)
		}
		if t.n > 0 {
			return t, nil
		}
	}
	return take{}, nil
}

// takeLow takes from the slice of refcounts that the cursor stands at. If there
// is nothing the cursor moves on, once. Preconditions: a.mu is held.
func (im *Image) takeLow(want int64) (take, error) {
	a, g := &im.allocator, &im.geo
	if a.low >= a.lowEnd {
		return take{}, nil
	}
	if t, _ := g.refblockIndex(a.low); t >= len(a.table()) || a.table()[t] == 0 {
		a.low = min(hostCluster(t+1)<<g.refblockBits, a.lowEnd)
		return take{}, nil
	}
	t, err := im.takeFree(a.low, a.lowEnd, want)
	if err == nil && t.missing == 0 {
		a.low = t.next
	}
	return t, err
}

// takeFree sets the first run of free clusters in [c, end), of at most want, to
// refcount 1. It looks no further than c's slice of refcounts, and never beyond
// end: free clusters there may be spoken for.
//
// Preconditions: a.mu is held; c's refcount block exists.
func (im *Image) takeFree(c, end hostCluster, want int64) (take, error) {
	g := &im.geo
	table, index := g.refblockIndex(c)
	block, err := g.refblockAt(im.allocator.table(), table)
	if err != nil {
		return take{}, err
	}
	off, _, _, perSlice := g.refcountSlice(block, index)
	t, ok := im.handle.TryGet(classRefblock, int64(off))
	if !ok {
		return take{missing: off}, nil
	}
	defer t.Unpin()
	lock := im.allocator.refcountLock(g, off)
	lock.Lock()
	defer lock.Unlock()
	got := take{next: min(end, c-c%hostCluster(perSlice)+hostCluster(perSlice))}
	for at := c; at < got.next && got.n < want; at++ {
		word, shift := g.refcountWord(int(at % hostCluster(perSlice)))
		w := t.Load(word)
		if g.getRefcount(w, shift) == 0 {
			if got.n == 0 {
				got.first = at
			}
			got.n++
			t.Store(word, g.setRefcount(w, shift, 1))
		} else if got.n > 0 {
			break
		}
	}
	if got.n > 0 {
		got.next = got.first + hostCluster(got.n)
	}
	return got, nil
}

// loadTable brings a slice into the cache. It may be gone again when the caller looks.
func (im *Image) loadTable(class tableClass, off HostOffset) error {
	t, err := im.handle.Get(class, int64(off))
	if err != nil {
		return err
	}
	t.Unpin()
	return nil
}

// allocTable allocates exactly n contiguous clusters for a table, and their space
// in the host file: a table whose write back finds the pool full would fail the
// image, so the request that needs the table fails instead.
func (im *Image) allocTable(n int64) (hostCluster, error) {
	first, err := im.allocContiguous(n)
	if err != nil {
		return 0, err
	}
	if err := im.reserveSpace(first, n); err != nil {
		im.free(first, n)
		return 0, err
	}
	return first, nil
}

// reserveSpace takes the space of n clusters from the host file system, if it can
// be taken in advance there.
func (im *Image) reserveSpace(first hostCluster, n int64) error {
	g := &im.geo
	err := im.f.Allocate(int64(g.hostOffset(first)), n*g.clusterSize)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("qcow2: reserve space for a table: %w", err)
	}
	return nil
}

// reserveTables takes the space of those tables from the host that a new image has
// as holes: the L1 table, the refcount table, and the refcount block of the tail.
// Their write back fails the image, too, if it finds the pool full. An image opens in a
// full pool all the same.
func (im *Image) reserveTables() error {
	g, a, l1 := &im.geo, &im.allocator, im.l1.Load()
	tables := []tableRange{
		{off: l1.off, end: l1.off + HostOffset(len(l1.entries)*entryBytes)},
		{off: a.reftableOff, end: a.reftableOff + HostOffset(len(a.table())*entryBytes)},
	}
	table, _ := g.refblockIndex(a.tail)
	if block, err := g.refblockAt(a.table(), table); err == nil && block != 0 {
		tables = append(tables, tableRange{off: block, end: block + HostOffset(g.clusterSize)})
	}
	for _, t := range tables {
		n := min(int64(t.end), a.fileEnd.Load()) - int64(t.off)
		if n <= 0 {
			continue
		}
		err := im.f.Allocate(int64(t.off), n)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return fmt.Errorf("qcow2: reserve space for a table: %w", err)
		}
	}
	return nil
}

func (im *Image) allocContiguous(n int64) (hostCluster, error) {
	a := &im.allocator
	if n == 1 {
		first, _, _, err := im.alloc(1)
		return first, err
	}
	a.growMu.Lock()
	first, err := im.reserveTail(n)
	if err == nil {
		err = im.coverTail(first, n)
	}
	a.growMu.Unlock()
	if err != nil {
		return 0, err
	}
	if err := im.addRefcounts(first, n, 1); err != nil {
		return 0, err
	}
	if err := im.extendFile(int64(im.geo.hostOffset(first)) + n*im.geo.clusterSize); err != nil {
		im.free(first, n)
		return 0, err
	}
	return first, nil
}

// reserveTail moves the tail past n clusters that no refcount block counts as
// used and returns the first.
//
// Preconditions: growMu is held.
func (im *Image) reserveTail(n int64) (hostCluster, error) {
	a, g := &im.allocator, &im.geo
	for {
		a.mu.Lock()
		first := a.tail
		a.tail += hostCluster(n)
		a.mu.Unlock()
		if first+hostCluster(n) > g.hostCluster(maxHostOffset) {
			return 0, errTooLong
		}
		used := false
		for c := first; c < first+hostCluster(n) && !used; c++ {
			count, err := im.refcount(c)
			if err != nil {
				return 0, err
			}
			used = count != 0
		}
		if !used {
			return first, im.checkUnguarded("cluster of refcount 0", g.hostOffset(first), n*g.clusterSize)
		}
	}
}

// free makes n clusters that nothing refers to, in memory or in the file,
// available again: what was allocated for a request that failed.
func (im *Image) free(first hostCluster, n int64) {
	// An error leaves the clusters allocated: a leak, which check can repair.
	if im.addRefcounts(first, n, -1) == nil {
		im.allocator.mu.Lock()
		im.allocator.rememberFreed(first, n)
		im.allocator.mu.Unlock()
	}
}

// rememberFreed records free clusters for reuse. Preconditions: mu is held.
func (a *allocator) rememberFreed(first hostCluster, n int64) {
	if len(a.freed) < maxFreed {
		a.freed = append(a.freed, run{first, n})
	} else if first < a.low {
		a.low = first
	}
}

// extendFile grows the host file to at least end, in large steps, before
// anything is written there: extending writes serialise in the host's file
// system, and on XFS may be lost when another call extends the file meanwhile.
func (im *Image) extendFile(end int64) error {
	a := &im.allocator
	if end <= a.fileEnd.Load() {
		return nil
	}
	a.growMu.Lock()
	defer a.growMu.Unlock()
	return im.extendFileLocked(end)
}

// extendFileLocked is extendFile with growMu held.
func (im *Image) extendFileLocked(end int64) error {
	a := &im.allocator
	size := a.fileEnd.Load()
	if end <= size {
		return nil
	}
	step := min(max(size/fileStepShare, fileStepMin, aheadClusters*im.geo.clusterSize), fileStepMax)
	size = im.geo.roundUp(max(end, size+step))
	if err := im.f.Truncate(size); err != nil {
		return fmt.Errorf("qcow2: extend the image file to %d bytes: %w", size, err)
	}
	im.handle.Order() // an entry must not name what lies beyond the end of the file
	a.fileEnd.Store(size)
	return nil
}
