package fuse

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestUnanswered: a change that the File leaves has no answer, others have, and
// Close waits for nothing. It is executed by the first process that does not leave it.
func TestUnanswered(t *testing.T) {
	defer goleak.VerifyNone(t)
	fresh := bytes.Repeat([]byte{2}, 8192)
	for _, tt := range []struct {
		op   opcode
		body []byte
		want []byte
	}{
		{opWrite, append(ioArgs(4096, 8192), fresh...), fresh},
		{opFallocate, fallocateArgs(4096, 8192, unix.FALLOC_FL_PUNCH_HOLE), make([]byte, 8192)},
	} {
		f := newMemFile()
		f.fail(ErrUnanswered)
		entered := make(chan bool)
		f.interpose(func() { entered <- true })
		k, c := serveFake(t, f, Options{Discard: true}, 2, nil)
		sent := k.send(tt.op, fileNode, tt.body)
		answer := func(want uint64) {
			t.Helper()
			unique, errno, _ := k.receive()
			for ; unique != want && unique != sent; unique, errno, _ = k.receive() { // answered again: no such request
			}
			if unique != want || errno != 0 {
				t.Fatalf("answer to %d: %v; want one to %d", unique, errno, want)
			}
		}
		for process := range 2 {
			<-entered
			answer(k.send(opGetattr, fileNode, make([]byte, 16)))
			if process == 1 {
				f.fail(nil)
				f.interpose(nil)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			empty := make([]byte, 4)
			if _, err := k.slots.ReadAt(empty, slotsEmpty); err != nil || wire.Uint32(empty) != 0 {
				t.Errorf("the slots are said to be empty: %d, %v", empty, err)
			}
			var err error
			if c, err = Adopt(dup(t, int(k.device.Fd())), dup(t, int(k.slots.Fd())), f, c.opts); err != nil {
				t.Fatal(err)
			}
		}
		answer(sent)
		if !bytes.Equal(f.get(4096, 8192), tt.want) {
			t.Errorf("request %d was not executed", tt.op)
		}
		k.end(c)
	}
}
