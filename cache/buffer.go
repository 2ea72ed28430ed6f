package cache

import (
	"sync"
	"unsafe"
)

// Copy buffers hold what a pass copies of one class, and start at a page. A
// handle has them during a pass only: an idle image costs none, and one pass after the
// other, of an image that is swept, does not fill the heap.
const (
	smallBytes = 64 << 10
	chunkBytes = chunkTables * slotBytes
)

var (
	smallBuffers = sync.Pool{New: func() any { return (*[smallBytes]byte)(alignedBuffer(smallBytes)) }}
	chunkBuffers = sync.Pool{New: func() any { return (*[chunkBytes]byte)(alignedBuffer(chunkBytes)) }}
)

// getCopyBuffer returns a buffer of at least n bytes, of chunkBytes at most.
func getCopyBuffer(n int) []byte {
	if n <= smallBytes {
		return smallBuffers.Get().(*[smallBytes]byte)[:]
	}
	return chunkBuffers.Get().(*[chunkBytes]byte)[:]
}

// putCopyBuffer takes b back, which may be nil.
func putCopyBuffer(b []byte) {
	switch len(b) {
	case smallBytes:
		smallBuffers.Put((*[smallBytes]byte)(b))
	case chunkBytes:
		chunkBuffers.Put((*[chunkBytes]byte)(b))
	}
}

// alignedBuffer returns n bytes that start at a page, for direct I/O.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+pageBytes)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (pageBytes - 1)
	return b[skip : skip+n : skip+n]
}
