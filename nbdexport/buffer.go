package nbdexport

import (
	"sync"
	"unsafe"
)

// bufferAlign is the alignment of buffers in memory: enough for O_DIRECT on
// every block device and filesystem.
const bufferAlign = 4096 // bytes

// maxBuffer is the largest buffer, and so the largest piece in which payload
// is moved. Pieces of a write end at multiples of it in the export, so that a
// cluster of a qcow2 image is never filled in two halves.
const maxBuffer = 2 << 20 // bytes

// bufferSizes are the sizes of pooled buffers.
var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, maxBuffer}

// A buffer is aligned memory for payload. It has one owner at a time, who
// releases it or hands it on.
type buffer struct {
	b     []byte // of one of bufferSizes
	class int    // index of its size in bufferSizes
}

// bufferPools hold free buffers, one pool per size. They give memory that is
// not used for a while back to the garbage collector.
var bufferPools [len(bufferSizes)]sync.Pool

// bufferClass returns the class of a buffer for n bytes, at most maxBuffer.
func bufferClass(n int) int {
	class := 0
	for bufferSizes[class] < n {
		class++
	}
	return class
}

// bufferCost returns what a buffer for n bytes costs in memory: it must be
// admitted before there is one.
func bufferCost(n int) int { return bufferSizes[bufferClass(n)] }

// newBuffer returns a buffer for n bytes, at most maxBuffer. Its content is
// arbitrary: earlier payload of any connection.
func newBuffer(n int) *buffer {
	class := bufferClass(n)
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: alignedBytes(bufferSizes[class]), class: class}
}

// release gives b back. Nobody may look at its memory any more.
func (b *buffer) release() { bufferPools[b.class].Put(b) }

// alignedBytes returns n zero bytes at a multiple of bufferAlign.
func alignedBytes(n int) []byte {
	b := make([]byte, n+bufferAlign)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & (bufferAlign - 1))
	return b[skip : skip+n : skip+n]
}
