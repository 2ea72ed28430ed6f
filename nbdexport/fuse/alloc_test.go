package fuse

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestNoAllocations: a request in steady state costs no memory.
func TestNoAllocations(t *testing.T) {
	for _, tt := range []struct {
		name string
		op   opcode
		body []byte
	}{
		{"read", opRead, ioArgs(4096, 4096)},
		{"write", opWrite, append(ioArgs(4096, 4096), make([]byte, 4096)...)},
		{"fsync", opFsync, make([]byte, 16)},
	} {
		k, c := serveFake(t, newMemFile(), Options{}, 2, nil)
		h := inHeader{len: uint32(inHeaderSize + len(tt.body)), opcode: tt.op, unique: 2, nodeID: fileNode}
		request := make([]byte, inHeaderSize)
		h.encode(request)
		request = append(request, tt.body...)
		answer := make([]byte, 2*maxData)
		n := testing.AllocsPerRun(1000, func() {
			if _, err := again(unix.Write, k.fd, request); err != nil {
				panic(err)
			}
			if _, err := again(unix.Read, k.fd, answer); err != nil {
				panic(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %g allocations per request", tt.name, n)
		}
		k.end(c)
	}
}
