package qcow2

import (
	"math/bits"
	"sync"
	"unsafe"
)

// Buffers come in classes of a power of two, from a page to maxBufferClass.
const (
	bufferAlign    = 4096 // bytes; enough for O_DIRECT everywhere
	minBufferClass = 12   // log2 of bytes
	maxBufferClass = 23
)

// bufferPools holds idle buffers, one pool per class. A pool keeps a pointer to
// the first byte, because a slice in an interface would be an allocation per
// Put; the length follows from the class. The garbage collector empties pools
// that are not in use, which bounds them.
var bufferPools [maxBufferClass + 1]sync.Pool

// GetBuffer returns a buffer of n bytes whose memory is aligned to 4096 bytes,
// so that O_DIRECT takes it. Its content is arbitrary. Buffers of up to 8 MiB
// are reused after PutBuffer; then GetBuffer does not allocate.
func GetBuffer(n int) []byte {
	class := bufferClass(n)
	if class > maxBufferClass {
		return newBuffer(n)[:n]
	}
	if p, ok := bufferPools[class].Get().(*byte); ok {
		return unsafe.Slice(p, 1<<class)[:n]
	}
	return newBuffer(1 << class)[:n]
}

// PutBuffer gives back a buffer of GetBuffer, as it was returned or cut at its
// end. The caller must not use it any more. Others, nil included, are ignored.
func PutBuffer(b []byte) {
	c := cap(b)
	if c < 1<<minBufferClass || c > 1<<maxBufferClass || c&(c-1) != 0 {
		return
	}
	p := unsafe.SliceData(b)
	if uintptr(unsafe.Pointer(p))%bufferAlign != 0 {
		return
	}
	bufferPools[bufferClass(c)].Put(p)
}

// bufferClass returns log2 of the smallest class that holds n bytes.
func bufferClass(n int) int {
	return max(bits.Len(uint(max(n, 1)-1)), minBufferClass)
}

// newBuffer allocates n aligned bytes. Go aligns what is a multiple of a page
// as we need it, but does not promise to.
func newBuffer(n int) []byte {
	b := make([]byte, n)
	if shift := uintptr(unsafe.Pointer(unsafe.SliceData(b))) % bufferAlign; shift != 0 {
		b = make([]byte, n+bufferAlign)
		shift = bufferAlign - uintptr(unsafe.Pointer(unsafe.SliceData(b)))%bufferAlign
		b = b[shift : shift+uintptr(n) : shift+uintptr(n)]
	}
	return b
}
