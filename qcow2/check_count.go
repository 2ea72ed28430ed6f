package qcow2

import (
	"cmp"
	"maps"
	"slices"
)

// refCounts counts the references to each host cluster that Check finds, and
// remembers what kind of references they are. Its memory follows the clusters
// that are referenced, not the size that the file claims: a chunk of 65536
// clusters holds a short sorted list until that list would be long.
type refCounts struct {
	near      []*countChunk          // by chunk number, below nearChunks
	far       map[uint64]*countChunk // by chunk number, the others
	spill     map[hostCluster]uint64 // counts of countMask and more
	lastIndex uint64                 // chunk number of last
	last      *countChunk            // the chunk used last
	max       uint64                 // refcounts of the image go no higher
	fastMax   counter                // counts below it can be raised in place
}

// A counter is what is known of one host cluster.
//
//	Bits   Meaning
//	 0-10  references; 2047: see spill
//	   11  metadata that nothing else may share: all but L2 tables
//	   12  an active entry that points here has COPIED set
//	   13  an active entry that points here has COPIED clear
//	   14  an L1 entry points here
//	   15  an L2 entry points here
type counter uint16

const (
	countMask  counter = 1<<11 - 1
	seenMeta   counter = 1 << 11
	seenCopied counter = 1 << 12
	seenPlain  counter = 1 << 13
	seenTable  counter = 1 << 14
	seenData   counter = 1 << 15

	chunkBits     = 16
	chunkClusters = 1 << chunkBits
	nearChunks    = 1 << 16 // 2^32 clusters
	listLimit     = 1024    // entries of a list; then it costs less to have them all
)

// A countChunk holds the counters of 65536 neighbouring clusters.
type countChunk struct {
	all  *[chunkClusters]counter // nil while list is short
	list []listedCounter         // sorted by index
}

type listedCounter struct {
	index uint16
	counter
}

func newRefCounts(g *geometry) *refCounts {
	return &refCounts{
		far: map[uint64]*countChunk{}, spill: map[hostCluster]uint64{},
		max: g.refcountMax, fastMax: counter(min(g.refcountMax, uint64(countMask))),
	}
}

// add counts one more reference to c of the kinds that flags say. It reports
// false, and keeps the count, if the image cannot record a higher one.
func (r *refCounts) add(c hostCluster, flags counter) bool {
	// The common case: the same chunk as before, with all its counters.
	if r.last == nil || r.last.all == nil || uint64(c)>>chunkBits != r.lastIndex {
		return r.addTo(r.slot(c), c, flags)
	}
	p := &r.last.all[c%chunkClusters]
	if *p&countMask >= r.fastMax {
		return r.addTo(p, c, flags)
	}
	*p = (*p | flags) + 1
	return true
}

func (r *refCounts) addTo(p *counter, c hostCluster, flags counter) bool {
	*p |= flags
	if *p&countMask < r.fastMax {
		*p++
		return true
	}
	n := r.count(c, *p)
	if n >= r.max {
		return false
	}
	r.spill[c] = n + 1
	return true
}

// sub takes back one successful add of metadata.
func (r *refCounts) sub(c hostCluster) {
	p := r.slot(c)
	*p &^= seenMeta
	n := r.count(c, *p) - 1
	if n < uint64(countMask) {
		delete(r.spill, c)
		*p = *p&^countMask | counter(n)
		return
	}
	r.spill[c] = n
}

// count returns the references of c, whose counter is v.
func (r *refCounts) count(c hostCluster, v counter) uint64 {
	if v&countMask < countMask {
		return uint64(v & countMask)
	}
	if n, ok := r.spill[c]; ok {
		return n
	}
	return uint64(countMask)
}

// shared reports whether c, whose counter is v, is metadata and something else.
func (r *refCounts) shared(c hostCluster, v counter) bool {
	return r.count(c, v) > 1 && (v&(seenTable|seenData) == seenTable|seenData || v&seenMeta != 0)
}

// references returns the references to c.
func (r *refCounts) references(c hostCluster) uint64 { return r.count(c, r.get(c)) }

// highest returns the highest cluster with a counter, 0 if there is none.
func (r *refCounts) highest() hostCluster {
	chunk := uint64(len(r.near))
	for i := range r.far {
		chunk = max(chunk, i+1)
	}
	for ; chunk > 0; chunk-- {
		if ch := r.chunk(chunk - 1); ch != nil {
			return hostCluster(chunk-1)<<chunkBits | hostCluster(ch.highest())
		}
	}
	return 0
}

// get returns the counter of c.
func (r *refCounts) get(c hostCluster) counter {
	ch := r.chunk(uint64(c) >> chunkBits)
	if ch == nil {
		return 0
	}
	return ch.get(int(c % chunkClusters))
}

// slot returns the counter of c to change it; it is valid until the next slot.
func (r *refCounts) slot(c hostCluster) *counter {
	index := uint64(c) >> chunkBits
	if r.last == nil || index != r.lastIndex {
		r.last, r.lastIndex = r.chunk(index), index
		if r.last == nil {
			r.last = &countChunk{}
			r.setChunk(index, r.last)
		}
	}
	if r.last.all != nil {
		return &r.last.all[c%chunkClusters]
	}
	return r.last.slot(uint16(c % chunkClusters))
}

// chunk returns the chunk of that number, or nil.
func (r *refCounts) chunk(index uint64) *countChunk {
	if index < uint64(len(r.near)) {
		return r.near[index]
	}
	return r.far[index]
}

func (r *refCounts) setChunk(index uint64, ch *countChunk) {
	if index >= nearChunks {
		r.far[index] = ch
		return
	}
	if n := int(index) + 1; n > len(r.near) {
		r.near = slices.Grow(r.near, n-len(r.near))[:n]
	}
	r.near[index] = ch
}

// each calls fn with every cluster in [from, to) that has a counter, in
// ascending order. fn must not add.
func (r *refCounts) each(from, to hostCluster, fn func(c hostCluster, v counter) error) error {
	do := func(index uint64, ch *countChunk) error {
		base := hostCluster(index) << chunkBits
		return ch.each(func(i int, v counter) error {
			if c := base + hostCluster(i); c >= from && c < to {
				return fn(c, v)
			}
			return nil
		})
	}
	first := uint64(from) >> chunkBits
	for i := first; i < uint64(len(r.near)) && hostCluster(i)<<chunkBits < to; i++ {
		if r.near[i] == nil {
			continue
		}
		if err := do(i, r.near[i]); err != nil {
			return err
		}
	}
	if len(r.far) == 0 || hostCluster(nearChunks)<<chunkBits >= to {
		return nil
	}
	for _, i := range slices.Sorted(maps.Keys(r.far)) {
		if i < first || hostCluster(i)<<chunkBits >= to {
			continue
		}
		if err := do(i, r.far[i]); err != nil {
			return err
		}
	}
	return nil
}

func (ch *countChunk) get(i int) counter {
	if ch.all != nil {
		return ch.all[i]
	}
	if k, ok := ch.find(uint16(i)); ok {
		return ch.list[k].counter
	}
	return 0
}

func (ch *countChunk) find(i uint16) (int, bool) {
	if n := len(ch.list); n == 0 || ch.list[n-1].index < i {
		return n, false
	}
	return slices.BinarySearchFunc(ch.list, i, func(l listedCounter, i uint16) int { return cmp.Compare(l.index, i) })
}

// slot returns the counter i of a chunk that is still a list.
func (ch *countChunk) slot(i uint16) *counter {
	k, ok := ch.find(i)
	if ok {
		return &ch.list[k].counter
	}
	if len(ch.list) < listLimit {
		ch.list = slices.Insert(ch.list, k, listedCounter{index: i})
		return &ch.list[k].counter
	}
	ch.all = new([chunkClusters]counter)
	for _, l := range ch.list {
		ch.all[l.index] = l.counter
	}
	ch.list = nil
	return &ch.all[i]
}

// highest returns the highest index with a counter.
func (ch *countChunk) highest() int {
	if ch.all == nil {
		return int(ch.list[len(ch.list)-1].index)
	}
	i := chunkClusters - 1
	for i > 0 && ch.all[i] == 0 {
		i--
	}
	return i
}

func (ch *countChunk) each(fn func(i int, v counter) error) error {
	if ch.all == nil {
		for _, l := range ch.list {
			if err := fn(int(l.index), l.counter); err != nil {
				return err
			}
		}
		return nil
	}
	for i, v := range ch.all {
		if v == 0 {
			continue
		}
		if err := fn(i, v); err != nil {
			return err
		}
	}
	return nil
}
