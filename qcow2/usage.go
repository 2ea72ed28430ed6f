package qcow2

import (
	"cmp"
	"context"
	"fmt"
	"slices"
)

// A Usage says which states of an image hold its host clusters. All figures are
// bytes of whole clusters: those that were given to a state, not those that the
// host file system has backed with blocks.
//
// Total = Metadata + Shared + the Unique of all states.
type Usage struct {
	Total    int64 // clusters whose refcount is not 0
	Metadata int64 // header, refcount table and blocks, snapshot table
	Shared   int64 // clusters that several states refer to, each counted once; leaks are in it
	Active   StateUsage
	// Snapshots are in the order of the snapshot table.
	Snapshots []StateUsage
}

// A StateUsage says what one state of an image, the active one or an internal
// snapshot, refers to: its L1 and L2 tables and its clusters of data.
type StateUsage struct {
	ID, Name string // of the snapshot; "" for the active state
	// Unique are clusters that no other state refers to: what deleting the
	// snapshot gives back, but for the snapshot table, which may shrink too.
	Unique int64
	Shared int64 // clusters that other states refer to as well
}

// Sizes of what SnapshotUsage holds in memory at most.
const (
	usageL1Bytes  = 16 << 20 // of L1 tables, of all states together
	usageCounters = 1 << 20  // counters of host clusters with compressed data
)

// SnapshotUsage reckons who holds the space of the image, from the tables and
// refcounts; it reads no data. What waits to be freed is freed first, so that on
// an image that nobody writes to the figures are exact. Under writers each
// figure is right for some moment of the call.
//
// It walks L1 index by L1 index over all states, so that a table which many of
// them share is read once.
func (im *Image) SnapshotUsage(ctx context.Context) (Usage, error) {
	im.structural.Lock()
	defer im.structural.Unlock()
	if im.closed.Load() {
		return Usage{}, ErrClosed
	}
	if err := im.prepareUsage(); err != nil {
		return Usage{}, err
	}
	w := newUsageWalk(im)
	if err := w.walkTables(ctx); err != nil {
		return Usage{}, fmt.Errorf("qcow2: usage of snapshots: %w", err)
	}
	for _, s := range w.states {
		if s.compressed {
			if err := w.walkCompressed(ctx, s); err != nil {
				return Usage{}, fmt.Errorf("qcow2: usage of compressed clusters: %w", err)
			}
		}
	}
	return w.usage(ctx)
}

// prepareUsage frees what waits to be freed, and makes refcounts readable.
func (im *Image) prepareUsage() error {
	if im.opts.ReadOnly {
		reftable, err := readTable(im.f, "refcount table", im.hdr.refcountTableOffset,
			int(int64(im.hdr.refcountTableClusters)*im.geo.clusterSize/entryBytes))
		if err != nil {
			return err
		}
		im.allocator.reftable.Store(&reftable)
		return nil
	}
	if err := im.failed(); err != nil {
		return err
	}
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	im.epochs.synchronize()
	return im.reclaimInTurn()
}

// A usedState is a state of the image in a usageWalk.
type usedState struct {
	id, name       string
	l1Off          HostOffset
	l1Size         int
	live           bool // the active state of an image that is open read-write
	compressed     bool // it has compressed clusters
	unique, shared int64
}

// A usageWalk adds up clusters by state.
type usageWalk struct {
	im     *Image
	states []*usedState // the active one first
	words  []uint64     // of one L2 slice

	counters []uint32    // references of one state to clusters [base, base+usageCounters)
	base     hostCluster // of counters
}

func newUsageWalk(im *Image) *usageWalk {
	w := &usageWalk{im: im, words: make([]uint64, im.geo.sliceBytes/entryBytes)}
	active := &usedState{l1Off: im.hdr.l1Offset, l1Size: int(im.hdr.l1Size)}
	if !im.opts.ReadOnly {
		l1 := im.l1.Load()
		active = &usedState{l1Off: l1.off, l1Size: len(l1.entries), live: true}
	}
	w.states = append(w.states, active)
	records := im.snapshots()
	for i := range records {
		r := &records[i]
		w.states = append(w.states, &usedState{id: r.id, name: r.name, l1Off: r.l1Offset, l1Size: int(r.l1Size)})
	}
	for _, s := range w.states {
		s.unique = im.geo.clusters(int64(s.l1Size) * entryBytes) // nobody shares an L1 table
	}
	return w
}

// walkTables adds up all but compressed clusters.
func (w *usageWalk) walkTables(ctx context.Context) error {
	most := 0
	for _, s := range w.states {
		most = max(most, s.l1Size)
	}
	chunk := max(1, usageL1Bytes/entryBytes/len(w.states))
	rows := make([][]uint64, len(w.states))
	users := make([]tableUser, 0, len(w.states))
	for first := 0; first < most; first += chunk {
		end := min(first+chunk, most)
		for i, s := range w.states {
			var err error
			if rows[i], err = w.readL1(s, first, end); err != nil {
				return err
			}
		}
		for index := first; index < end; index++ {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := w.walkIndex(rows, users, index, index-first); err != nil {
				return err
			}
		}
	}
	return nil
}

// readL1 reads entries [first, end) of the L1 table of s, as far as it has them.
// Those of a live state are left for the moment at which they are used.
func (w *usageWalk) readL1(s *usedState, first, end int) ([]uint64, error) {
	if s.live || first >= s.l1Size {
		return nil, nil
	}
	off := s.l1Off + HostOffset(first*entryBytes)
	entries, err := readTable(w.im.f, "snapshot L1 table", off, min(end, s.l1Size)-first)
	if err != nil {
		return nil, err
	}
	return entries, w.im.checkL1("snapshot L1 entry", off, entries)
}

// A tableUser says that a state has its L2 table at off.
type tableUser struct {
	off   HostOffset
	state *usedState
}

// walkIndex adds up the L2 tables of one L1 index: rows hold the entries of the
// states at column, but for a live one.
func (w *usageWalk) walkIndex(rows [][]uint64, users []tableUser, index, column int) error {
	slot := w.im.epochs.enter() // a table that is replaced meanwhile keeps its cluster
	defer w.im.epochs.exit(slot)
	for i, s := range w.states {
		var off HostOffset
		if s.live {
			if index >= s.l1Size { // a snapshot is of a longer disk
				continue
			}
			var err error
			if off, _, err = w.im.l2Table(w.im.l1.Load(), index); err != nil {
				return err
			}
		} else if column < len(rows[i]) {
			off = l1Entry(rows[i][column]).offset()
		}
		if off != 0 {
			users = append(users, tableUser{off, s})
		}
	}
	slices.SortFunc(users, func(a, b tableUser) int { return cmp.Compare(a.off, b.off) })
	for len(users) > 0 {
		n := 1
		for n < len(users) && users[n].off == users[0].off {
			n++
		}
		if err := w.walkTable(users[:n]); err != nil {
			return err
		}
		users = users[n:]
	}
	return nil
}

// walkTable adds up one L2 table and its clusters for those who use it. All
// clusters of a table that several states share are shared: the refcounts of
// clusters count the ways that lead to them.
func (w *usageWalk) walkTable(users []tableUser) error {
	g, off := &w.im.geo, users[0].off
	alone := len(users) == 1
	count, err := w.im.refcount(g.hostCluster(off))
	if err != nil {
		return err
	}
	unique, shared, compressed := int64(0), int64(0), false
	if alone && count <= 1 {
		unique++
	} else {
		shared++
	}
	var last run // clusters of one refcount
	lastAlone := false
	err = w.eachEntry(off, func(e l2Entry) error {
		if e.compressed() {
			compressed = true
			return nil
		}
		if e.offset() == 0 {
			return nil
		}
		if !alone {
			shared++
			return nil
		}
		c := g.hostCluster(e.offset())
		if c < last.first || c >= last.first+hostCluster(last.n) {
			count, n, err := w.im.refcountRun(c, int64(len(w.words)))
			if err != nil {
				return err
			}
			last, lastAlone = run{c, n}, count <= 1
		}
		if lastAlone {
			unique++
		} else {
			shared++
		}
		return nil
	})
	for _, u := range users {
		u.state.unique += unique
		u.state.shared += shared
		u.state.compressed = u.state.compressed || compressed
	}
	return err
}

// eachEntry calls visit with the checked entries of the L2 table at off.
func (w *usageWalk) eachEntry(off HostOffset, visit func(l2Entry) error) error {
	index := 0
	for slice := int64(0); slice < w.im.geo.clusterSize; slice += int64(w.im.geo.sliceBytes) {
		t, err := w.im.handle.Get(classL2, int64(off)+slice)
		if err != nil {
			return err
		}
		t.Words(w.words, 0)
		t.Unpin()
		for _, word := range w.words {
			if err := w.im.checkL2(l2Entry(word), off, index); err != nil {
				return err
			}
			if err := visit(l2Entry(word)); err != nil {
				return err
			}
			index++
		}
	}
	return nil
}

// usage returns what was added up, with the clusters of the image as a whole.
func (w *usageWalk) usage(ctx context.Context) (Usage, error) {
	im, size := w.im, w.im.geo.clusterSize
	total, blocks, err := w.countAllocated(ctx)
	if err != nil {
		return Usage{}, err
	}
	meta := 1 + im.geo.clusters(int64(len(im.allocator.table()))*entryBytes) + blocks
	im.hdrMu.Lock()
	meta += im.geo.clusters(im.recordsBytes)
	im.hdrMu.Unlock()
	u := Usage{Total: total * size, Metadata: meta * size}
	u.Shared = u.Total - u.Metadata
	for i, s := range w.states {
		su := StateUsage{s.id, s.name, s.unique * size, s.shared * size}
		u.Shared -= su.Unique
		if i == 0 {
			u.Active = su
		} else {
			u.Snapshots = append(u.Snapshots, su)
		}
	}
	u.Shared = max(u.Shared, 0) // writers may have gone on between the looks
	return u, nil
}

// countAllocated returns how many clusters have a refcount, and how many
// refcount blocks there are.
func (w *usageWalk) countAllocated(ctx context.Context) (clusters, blocks int64, err error) {
	g, reftable := &w.im.geo, w.im.allocator.table()
	for t := range reftable {
		if reftable[t] == 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return 0, 0, err
		}
		blocks++
		first := hostCluster(t) << g.refblockBits
		for c, end := first, first+hostCluster(1)<<g.refblockBits; c < end; {
			count, n, err := w.im.refcountRun(c, int64(end-c))
			if err != nil {
				return 0, 0, err
			}
			if count > 0 {
				clusters += n
			}
			c += hostCluster(n)
		}
	}
	return clusters, blocks, nil
}
