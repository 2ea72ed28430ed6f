package cache

// A slot is what the process knows of a slot beside its directory entry. It
// holds no pointers: a million of them cost the garbage collector nothing.
type slot struct {
	off        int64     // host offset of the table; constant while assigned
	prev, next slotIndex // neighbours in the list that holds the slot; guarded by the owner's mu
	item       int32     // index into the running pass's items, or noItem; guarded by the owner's mu
}

const (
	noSlot = ^slotIndex(0)
	noItem = -1
)

// A list is a doubly linked list of slots of one handle, in the order of
// arrival. Every assigned slot that is not being loaded or copied by a pass is in exactly one:
// the clean ones in Handle.clean, the dirty ones in Handle.dirty of their
// class. So dirty tables are found, and a handle is released, without a scan of
// the cache. All is guarded by Handle.mu.
type list struct {
	head, tail slotIndex
	n          int
}

func (l *list) init() { l.head, l.tail, l.n = noSlot, noSlot, 0 }

// push appends slot i.
func (l *list) push(slots []slot, i slotIndex) {
	slots[i].prev, slots[i].next = l.tail, noSlot
	if l.tail == noSlot {
		l.head = i
	} else {
		slots[l.tail].next = i
	}
	l.tail = i
	l.n++
}

// remove takes slot i, which is in the list, out of it.
func (l *list) remove(slots []slot, i slotIndex) {
	p, n := slots[i].prev, slots[i].next
	if p == noSlot {
		l.head = n
	} else {
		slots[p].next = n
	}
	if n == noSlot {
		l.tail = p
	} else {
		slots[n].prev = p
	}
	l.n--
}
