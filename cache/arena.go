package cache

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// slotBytes is the size of a slot: the largest table slice, and a page, so
	// that loads into it suit direct I/O.
	slotBytes = 4096

	entryBytes = 64 // of a directory entry: one cache line
	pageBytes  = 4096
	headerSize = pageBytes
)

// An arena is the memory of the slots and of the directory that describes them.
//
//	[0, 4096)             header (see header) and marks (see marks)
//	[4096, data)          directory: one 64-byte entry per slot, then zeroes up to a page
//	[data, data+n*4096)   slots
//
// An anonymous arena has the same layout and no header. Rule A1 holds for
// both: the content of a slot and the words of its entry are stored before the
// state word that publishes them, and a slot is unpublished before they change.
// What a process stored before it was killed is what its successor maps.
//
// While a slot is published, its content and its entry are accessed by aligned
// 64-bit atomics only; but a run of words is stored plainly (Table.SetWords). While it is not, its one owner may fill it by other
// means: a read(2), a clear. The atomic store of the state word orders the two.
//
// Off-heap memory, because a successor must be able to map it, and because the
// garbage collector has no business with gigabytes of tables. The race
// detector does not see it: everything that tests must see is guarded by words
// on the heap.
type arena struct {
	mem   []byte
	dir   unsafe.Pointer
	data  unsafe.Pointer
	slots int
	file  *os.File // nil if anonymous; holds the lock

	onStore func() // see Options.OnStore; nil in production
}

// arenaLayout returns where the data starts and the size of an arena.
func arenaLayout(slots int) (data, size int64) {
	dir := int64(slots) * entryBytes
	data = headerSize + (dir+pageBytes-1)&^(pageBytes-1)
	return data, data + int64(slots)*slotBytes
}

func newArena(mem []byte, slots int) *arena {
	data, _ := arenaLayout(slots)
	base := unsafe.Pointer(unsafe.SliceData(mem))
	return &arena{
		mem:   mem,
		dir:   unsafe.Add(base, headerSize),
		data:  unsafe.Add(base, data),
		slots: slots,
	}
}

// mapAnonymous returns an arena that dies with the process. Its pages take
// memory when they are first used.
func mapAnonymous(slots int) (*arena, error) {
	_, size := arenaLayout(slots)
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("cache: map %d bytes: %w", size, err)
	}
	return newArena(mem, slots), nil
}

func (a *arena) unmap() error {
	var errs []error
	if err := unix.Munmap(a.mem); err != nil {
		errs = append(errs, fmt.Errorf("cache: unmap arena: %w", err))
	}
	if a.file != nil {
		errs = append(errs, closeLocked(a.file))
	}
	return errors.Join(errs...)
}

// lock keeps the arena in memory.
func (a *arena) lock() error {
	if err := unix.Mlock(a.mem); err != nil {
		return fmt.Errorf("cache: lock %d bytes in memory (RLIMIT_MEMLOCK or CAP_IPC_LOCK): %w", len(a.mem), err)
	}
	return nil
}

// slot returns the first byte of a slot.
func (a *arena) slot(i slotIndex) unsafe.Pointer {
	return unsafe.Add(a.data, uintptr(i)*slotBytes)
}

// bytes returns the first n bytes of a slot that is not published.
func (a *arena) bytes(i slotIndex, n int) []byte {
	return unsafe.Slice((*byte)(a.slot(i)), n)
}

// copyOut copies the first len(p) bytes of a published slot, word by word.
func (a *arena) copyOut(p []byte, i slotIndex) {
	src := unsafe.Slice((*uint64)(a.slot(i)), len(p)/8)
	dst := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(p))), len(p)/8)
	for n := 0; n < len(src) && n < len(dst); n++ {
		dst[n] = atomic.LoadUint64(&src[n])
	}
}

func (a *arena) word(i slotIndex, n uintptr) *uint64 {
	return (*uint64)(unsafe.Add(a.dir, uintptr(i)*entryBytes+n*8))
}

func (a *arena) headerWord(n int) *uint64 {
	return (*uint64)(unsafe.Add(unsafe.Pointer(unsafe.SliceData(a.mem)), n*8))
}

func (a *arena) state(i slotIndex) state {
	return state(atomic.LoadUint64(a.word(i, wordState)))
}

func (a *arena) setState(i slotIndex, s state) {
	a.store(a.word(i, wordState), uint64(s))
}

func (a *arena) swapState(i slotIndex, old, new state) bool {
	if a.onStore != nil {
		a.onStore()
	}
	return atomic.CompareAndSwapUint64(a.word(i, wordState), uint64(old), uint64(new))
}

// store stores into a word that a successor may read. All such stores go
// through here and swapState.
func (a *arena) store(p *uint64, v uint64) {
	if a.onStore != nil {
		a.onStore()
	}
	atomic.StoreUint64(p, v)
}
