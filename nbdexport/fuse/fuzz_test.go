package fuse

import (
	"testing"

	"golang.org/x/sys/unix"
)

// FuzzRequest: whatever is in a slot, a reader answers it and goes on; memory outside
// of the file and the slot is not touched.
func FuzzRequest(f *testing.F) {
	f.Add(uint32(opWrite), uint64(fileNode), append(ioArgs(4096, 2), "ab"...))
	f.Add(uint32(opRead), uint64(fileNode), ioArgs(fileSize-1, 4096))
	f.Add(uint32(opFallocate), uint64(fileNode), fallocateArgs(0, 1<<63, unix.FALLOC_FL_ZERO_RANGE))
	f.Add(uint32(opLookup), uint64(rootNode), []byte("file\x00"))
	f.Add(uint32(opReaddir), uint64(rootNode), ioArgs(0, 4096))
	f.Add(uint32(opInit), uint64(0), make([]byte, 16))
	f.Fuzz(func(t *testing.T, op uint32, node uint64, body []byte) {
		if len(body) > maxData+ioInSize || opcode(op) == opForget || opcode(op) == opBatchForget {
			return // a kernel does not send it, or wants no answer
		}
		k, c := serveFake(t, newMemFile(), Options{Discard: true}, 1, nil)
		_, answer := k.call(opcode(op), node, body)
		if len(answer) > maxData {
			t.Errorf("an answer of %d bytes", len(answer))
		}
		if errno, _ := k.call(opGetattr, fileNode, make([]byte, 16)); errno != 0 {
			t.Errorf("afterwards: %v", errno)
		}
		k.end(c)
	})
}

// FuzzSlots: slots of any content are refused or served, without harm.
func FuzzSlots(f *testing.F) {
	h := slotsHeader{count: 1, data: maxData, canary: 7}
	page := make([]byte, pageSize)
	h.encode(page)
	f.Add(page)
	f.Fuzz(func(t *testing.T, page []byte) {
		if len(page) < pageSize {
			return // the file is read by the page
		}
		h, err := decodeSlotsHeader(page)
		if err == nil && (h.fileSize() > pageSize+maxSlots*(pageSize+maxSlotData) || h.fileSize() < 2*pageSize) {
			t.Errorf("%+v takes %d bytes", h, h.fileSize())
		}
	})
}
