package cache

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// Marks name the images that have failed, so that a successor knows: a change
// that was acknowledged may be neither in the file nor dirty in the arena. They
// lie behind the header, on its page:
//
//	Offset   Size  Field  Meaning
//	64+24*i     8  id     bytes 0-7 of the image's identity, little endian
//	72+24*i     8  id     bytes 8-15
//	80+24*i     8  word   the publish word: 0 for a free mark, else a markKind
//	                      and markCheck of the other two
//
// The last mark is for all images that find no free one: its identity is zero,
// and with it every image counts as failed for a successor.
const (
	maxMarks  = (headerSize - headerBytes) / markBytes
	markBytes = 24
	markWords = markBytes / 8
)

// A markKind says in which state a predecessor left an image. The two bits lie
// below those of markCheck.
type markKind uint64

const (
	markNone   markKind = 0
	markFailed markKind = 1 // a write or a sync failed; the dirty tables are all there
	markGone   markKind = 2 // and not all dirty tables are: some were displaced

	markMask markKind = 3
)

func markCheck(lo, hi uint64) uint64 { return (mix(mix(lo)^hi) | 4) &^ uint64(markMask) }

// marks are the marks of an arena.
type marks struct {
	arena     *arena
	inherited bool                  // a predecessor has set the last mark: for whom, is not known
	mu        sync.Mutex            // a leaf: nothing is locked under it
	unnamed   map[[16]byte]struct{} // those of this process whom the last mark is for; guarded by mu
}

func (m *marks) init(a *arena) {
	m.arena, m.unnamed = a, map[[16]byte]struct{}{}
	_, last := m.load(maxMarks - 1)
	m.inherited = last != markNone
}

func (m *marks) word(i, n int) *uint64 { return m.arena.headerWord(headerWords + i*markWords + n) }

func (m *marks) load(i int) (id [16]byte, k markKind) {
	return wordsID(atomic.LoadUint64(m.word(i, 0)), atomic.LoadUint64(m.word(i, 1))),
		markKind(atomic.LoadUint64(m.word(i, 2))) & markMask
}

// validate returns an error if a mark is damaged: nothing of the arena is to
// be trusted then.
func (m *marks) validate() error {
	for i := range maxMarks {
		word := atomic.LoadUint64(m.word(i, 2))
		if word == 0 {
			continue
		}
		lo, hi := atomic.LoadUint64(m.word(i, 0)), atomic.LoadUint64(m.word(i, 1))
		if k := markKind(word) & markMask; k == markNone || k == markMask || word&^uint64(markMask) != markCheck(lo, hi) {
			return fmt.Errorf("mark %d: word %#x, want check %#x", i, word, markCheck(lo, hi))
		}
	}
	return nil
}

// of returns the mark of the image id; markGone if it is not known.
func (m *marks) of(id [16]byte) markKind {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := m.findLocked(id); i >= 0 {
		_, k := m.load(i)
		return k
	}
	if _, unnamed := m.unnamed[id]; unnamed || m.inherited {
		return markGone
	}
	return markNone
}

// set marks the image id, which is not zero. A mark never becomes a lower one.
func (m *marks) set(id [16]byte, k markKind) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.findLocked(id)
	if i >= 0 {
		_, old := m.load(i)
		k = max(k, old)
	}
	for n := 0; n < maxMarks-1 && i < 0; n++ {
		if _, old := m.load(n); old == markNone {
			i = n
		}
	}
	if i < 0 {
		m.unnamed[id] = struct{}{}
		i, id, k = maxMarks-1, [16]byte{}, markGone
	}
	lo, hi := idWords(id)
	m.arena.store(m.word(i, 0), lo)
	m.arena.store(m.word(i, 1), hi)
	m.arena.store(m.word(i, 2), markCheck(lo, hi)|uint64(k))
}

// clear takes the mark of the image id away.
func (m *marks) clear(id [16]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := m.findLocked(id); i >= 0 {
		m.arena.store(m.word(i, 2), 0)
	}
	if _, unnamed := m.unnamed[id]; unnamed {
		delete(m.unnamed, id)
		if len(m.unnamed) == 0 && !m.inherited {
			m.arena.store(m.word(maxMarks-1, 2), 0)
		}
	}
}

// reset takes all marks away.
func (m *marks) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range maxMarks {
		m.arena.store(m.word(i, 2), 0)
	}
}

// all returns the identities of the marked images.
func (m *marks) all() [][16]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids [][16]byte
	for i := range maxMarks - 1 {
		if id, k := m.load(i); k != markNone {
			ids = append(ids, id)
		}
	}
	return ids
}

// findLocked returns the number of the mark of the image id, or -1.
func (m *marks) findLocked(id [16]byte) int {
	for i := range maxMarks - 1 {
		if got, k := m.load(i); k != markNone && got == id {
			return i
		}
	}
	return -1
}
