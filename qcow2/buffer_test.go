package qcow2

import (
	"testing"
	"unsafe"
)

func TestGetBuffer(t *testing.T) {
	for _, n := range []int{0, 1, 511, 4095, 4096, 4097, 65536, 1<<20 + 1, 1 << maxBufferClass, 1<<maxBufferClass + 1} {
		for range 3 {
			b := GetBuffer(n)
			if len(b) != n {
				t.Fatalf("GetBuffer(%d) has %d bytes", n, len(b))
			}
			if a := uintptr(unsafe.Pointer(unsafe.SliceData(b))); a%bufferAlign != 0 {
				t.Errorf("GetBuffer(%d) lies at %#x", n, a)
			}
			b = b[:cap(b)]
			b[0], b[len(b)-1] = 1, 1 // mapped from end to end
			PutBuffer(b[:n])
		}
	}
}

// TestPutBufferForeign gives back what GetBuffer did not return.
func TestPutBufferForeign(t *testing.T) {
	b := GetBuffer(8192)
	PutBuffer(nil)
	PutBuffer(make([]byte, 100))
	PutBuffer(b[1:])
	PutBuffer(b[4096:8192:8192][1:])
	if c := GetBuffer(8192); uintptr(unsafe.Pointer(unsafe.SliceData(c)))%bufferAlign != 0 {
		t.Error("a buffer of foreign memory came back")
	}
}
