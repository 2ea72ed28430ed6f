package storagetest

import (
	"fmt"
	"hash/maphash"
	"iter"
	"math/rand/v2"
	"slices"
)

// A State is a legal content of the file after a power loss.
type State struct {
	At   int    // number of events of the log before the power loss
	What string // which of the unsynced changes were kept
	Sum  uint64 // hash of the content: equal for equal contents of one process

	pages map[int64]*page // frozen
	size  int64
}

// Disk returns a new disk in the state, all of it durable.
func (s State) Disk() *Disk {
	d := NewDisk()
	for i, p := range s.pages {
		if p != nil {
			d.pages[i] = p
		}
	}
	d.size, d.durableSize = s.size, s.size
	return d
}

// exhaustive is the number of unsynced pages up to which all subsets of them are tried.
const exhaustive = 5

// States yields after-crash states at each crash point of the log: before its
// first event and after each one. At each point it tries none of the unsynced
// changes, all, each page alone, all but each page, all subsets of pages when
// they are few, and random random choices of page versions, torn pages and
// sizes. Content that equals an earlier state since the same sync is not
// repeated. The log must not grow meanwhile.
func (l *Log) States(rng *rand.Rand, random int) iter.Seq[State] {
	return func(yield func(State) bool) {
		r := newReplay(l)
		for at := 0; ; at++ {
			if !r.states(at, rng, random, yield) || at == len(l.events) {
				return
			}
			r.step(l.events[at])
		}
	}
}

// CrashClone returns a random after-crash state of d, which must be recording.
func (d *Disk) CrashClone(rng *rand.Rand) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := newReplay(d.log)
	for _, e := range d.log.events {
		r.step(e)
	}
	return r.choose(len(d.log.events), "random", rng.IntN(len(r.sizes)), r.randomPages(rng)).Disk()
}

// A replay is a walk through a log.
type replay struct {
	pages map[int64]*page // current content, frozen
	size  int64

	versions map[int64][]*page // of each page changed since the last sync, the durable one first
	sizes    []int64           // the durable one first
	order    []int64           // keys of versions in the order of their first change
	seen     map[uint64]bool   // states yielded since the last sync
}

func newReplay(l *Log) *replay {
	r := &replay{pages: make(map[int64]*page, len(l.base)), size: l.size}
	for i, p := range l.base {
		r.pages[i] = p
	}
	r.sync()
	return r
}

// sync forgets all versions but the current one.
func (r *replay) sync() {
	r.versions = make(map[int64][]*page)
	r.sizes = []int64{r.size}
	r.order = r.order[:0]
	r.seen = make(map[uint64]bool)
}

// step applies e to the current content.
func (r *replay) step(e Event) {
	switch e.Op {
	case OpSync:
		r.sync()
		return
	case opDrop:
		for i, v := range r.versions {
			r.pages[i] = v[0]
		}
		r.size = r.sizes[0]
		r.sync()
		return
	}
	size := e.apply(r.size, r.pages, func(i int64) *page {
		old := r.pages[i]
		p := &page{frozen: true}
		if old != nil {
			p.b = old.b
		}
		if r.versions[i] == nil {
			r.versions[i] = []*page{old}
			r.order = append(r.order, i)
		}
		r.versions[i] = append(r.versions[i], p)
		r.pages[i] = p
		return p
	})
	if size != r.size {
		r.size = size
		r.sizes = append(r.sizes, size)
	}
}

// states yields the states of one crash point; false means stop.
func (r *replay) states(at int, rng *rand.Rand, random int, yield func(State) bool) bool {
	last := len(r.sizes) - 1
	try := func(what string, size int, pages map[int64]*page) bool {
		s := r.choose(at, what, size, pages)
		if r.seen[s.Sum] {
			return true
		}
		r.seen[s.Sum] = true
		return yield(s)
	}
	if !try("all", last, r.kept(func(int) bool { return true })) ||
		!try("none", 0, nil) ||
		!try("size only", last, nil) {
		return false
	}
	n := len(r.order)
	if n <= exhaustive {
		for set := range 1 << n {
			if !try(fmt.Sprintf("pages %#b", set), last, r.kept(func(k int) bool { return set&(1<<k) != 0 })) {
				return false
			}
		}
	}
	for k, i := range r.order {
		if !try(fmt.Sprintf("only page %#x", i*PageSize), last, r.kept(func(j int) bool { return j == k })) ||
			!try(fmt.Sprintf("all but page %#x", i*PageSize), last, r.kept(func(j int) bool { return j != k })) {
			return false
		}
	}
	for range random {
		if n == 0 {
			break
		}
		size := last
		if rng.IntN(4) == 0 {
			size = rng.IntN(len(r.sizes))
		}
		if !try("random", size, r.randomPages(rng)) {
			return false
		}
	}
	return true
}

// kept returns the last version of the pages whose place in order keep accepts.
func (r *replay) kept(keep func(k int) bool) map[int64]*page {
	m := make(map[int64]*page)
	for k, i := range r.order {
		if keep(k) {
			m[i] = r.pages[i]
		}
	}
	return m
}

// randomPages picks a version of each changed page, some of them torn.
func (r *replay) randomPages(rng *rand.Rand) map[int64]*page {
	m := make(map[int64]*page)
	bias := rng.IntN(3) // towards old, none, towards new
	for _, i := range r.order {
		v := r.versions[i]
		k := rng.IntN(len(v))
		switch bias {
		case 0:
			k = min(k, rng.IntN(len(v)))
		case 2:
			k = max(k, rng.IntN(len(v)))
		}
		m[i] = v[k]
		if k > 0 && rng.IntN(4) == 0 {
			m[i] = torn(v[k-1], v[k], rng.Uint32())
		}
	}
	return m
}

// torn returns a page whose sectors come from a or b as the bits of mask say.
func torn(a, b *page, mask uint32) *page {
	t := &page{frozen: true}
	for s := range PageSize / SectorSize {
		from := a
		if mask&(1<<s) != 0 {
			from = b
		}
		if from != nil {
			copy(t.b[s*SectorSize:(s+1)*SectorSize], from.b[s*SectorSize:])
		}
	}
	return t
}

// choose builds the state with the given versions of changed pages, durable
// ones where chosen has none, and the size with the given index.
func (r *replay) choose(at int, what string, size int, chosen map[int64]*page) State {
	s := State{At: at, What: what, size: r.sizes[size], pages: make(map[int64]*page, len(r.pages))}
	for i, p := range r.pages {
		if v := r.versions[i]; v != nil {
			p = v[0]
		}
		if c, ok := chosen[i]; ok {
			p = c
		}
		if p == nil || i*PageSize >= s.size {
			continue
		}
		if end := s.size - i*PageSize; end < PageSize && !slices.Equal(p.b[end:], zeroes[end:]) {
			cut := &page{b: p.b, frozen: true}
			clear(cut.b[end:])
			p = cut
		}
		s.pages[i] = p
		s.Sum += p.hash(i)
	}
	s.Sum ^= uint64(s.size) * 0x9e3779b97f4a7c15
	return s
}

var (
	zeroes   [PageSize]byte
	hashSeed = maphash.MakeSeed()
)

// hash returns a hash of p as page i; pages of zeroes count as absent. Frozen
// pages may be shared by disks of several goroutines.
func (p *page) hash(i int64) uint64 {
	sum := p.sum.Load()
	if sum == 0 {
		sum = 1
		if p.b != zeroes {
			sum = max(2, maphash.Bytes(hashSeed, p.b[:]))
		}
		p.sum.Store(sum)
	}
	if sum == 1 {
		return 0
	}
	h := (sum ^ uint64(i)) * 0xff51afd7ed558ccd
	h ^= h >> 33
	return h * 0xc4ceb9fe1a85ec53
}
