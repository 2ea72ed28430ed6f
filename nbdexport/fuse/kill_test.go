package fuse

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestKilledAtEachPoint kills the server at each point of the life of each kind
// of request, as often as it takes until the request gets through, and overtakes
// what was answered.
func TestKilledAtEachPoint(t *testing.T) {
	points := []point{"during", atRead, atExecuted, atFinished, atBuilt, atReplied}
	old, fresh, newer := bytes.Repeat([]byte{1}, 8192), bytes.Repeat([]byte{2}, 8192), bytes.Repeat([]byte{3}, 8192)
	for _, tt := range []struct {
		op   opcode
		body []byte
		want []byte // the range afterwards
	}{
		{opWrite, append(ioArgs(4096, 8192), fresh...), fresh},
		{opWrite, append(ioArgs(4096, 512), fresh[:512]...), append(bytes.Clone(fresh[:512]), old[512:]...)},
		{opFallocate, fallocateArgs(4096, 8192, unix.FALLOC_FL_PUNCH_HOLE), make([]byte, 8192)},
		{opFallocate, fallocateArgs(4096, 1, unix.FALLOC_FL_ZERO_RANGE), append([]byte{0}, old[1:]...)},
		{opRead, ioArgs(4096, 8192), old},
		{opFsync, make([]byte, 16), old},
		{opGetattr, make([]byte, 16), old},
		{opLookup, []byte("file\x00"), old},
		{opInit, append([]byte{7, 0, 0, 0, 45, 0, 0, 0}, make([]byte, 56)...), old},
	} {
		for _, p := range points {
			for times := 1; times <= 3; times++ {
				t.Run(fmt.Sprintf("%d/%s/%d", tt.op, p, times), func(t *testing.T) {
					f := newMemFile()
					f.set(4096, old)
					var left atomic.Int32
					left.Store(int32(times))
					killed, through := make(chan bool, 1), make(chan bool, 1)
					at := func(q point) {
						if q == p && left.Add(-1) >= 0 {
							killed <- true
							kill()
						}
						if q == atReplied {
							through <- true
						}
					}
					f.interpose(func() { at("during") })
					k, c := serveFake(t, f, Options{Discard: true}, 1, at)
					node := uint64(fileNode)
					if tt.op == opLookup {
						node = rootNode
					}
					sent, want := k.send(tt.op, node, tt.body), tt.want
					for answered := false; !answered; {
						select {
						case <-killed:
							if p == atReplied { // the kernel has the answer, and somebody writes there again
								k.expect(sent, 0)
								f.set(4096, newer)
								want = newer
							}
							c = k.succeed(c, f, at)
						case <-through:
							k.expect(sent, 0)
							answered = true
						}
					}
					if got := f.get(4096, 8192); !bytes.Equal(got, want) {
						t.Errorf("the range begins with %d.. and ends with ..%d; want %d and %d", got[0], got[8191], want[0], want[8191])
					}
					// All goes on.
					left.Store(0)
					if errno, body := k.call(opRead, fileNode, ioArgs(4096, 8192)); errno != 0 || !bytes.Equal(body, want) {
						t.Errorf("read afterwards: %v", errno)
					}
					k.end(c)
				})
			}
		}
	}
}

// expect receives the answer to a request.
func (k *fakeKernel) expect(want uint64, wantErrno unix.Errno) {
	k.t.Helper()
	if unique, errno, _ := k.receive(); unique != want || errno != wantErrno {
		k.t.Fatalf("answer to %d: %v; want one to %d: %v", unique, errno, want, wantErrno)
	}
}

// succeed lets a successor of c, whose only reader was killed, take over.
func (k *fakeKernel) succeed(c *Conn, f File, at func(point)) *Conn {
	k.t.Helper()
	if err := c.release(); err != nil { // what the kernel does at the end of a process
		k.t.Fatal(err)
	}
	next, err := adopt(dup(k.t, int(k.device.Fd())), dup(k.t, int(k.slots.Fd())), f, c.opts, at)
	if err != nil {
		k.t.Fatal(err)
	}
	return next
}

// TestRequestInPart: of a request that is not all in the slot nothing is executed.
func TestRequestInPart(t *testing.T) {
	f := newMemFile()
	killed := make(chan bool, 1)
	k, c := serveFake(t, f, Options{}, 1, func(p point) {
		if p == atRead {
			killed <- true
			kill()
		}
	})
	sent := k.send(opWrite, fileNode, ioArgs(0, 8192), bytes.Repeat([]byte{2}, 8192))
	<-killed
	// The kernel has not got to the second page of data.
	wire.PutUint64(c.slots.peek(0).data()[pageSize:], c.slots.canary)
	next := k.succeed(c, f, nil)
	k.expect(sent, unix.EIO)
	if f.get(0, 1)[0] != 0xee {
		t.Error("a request in part was executed")
	}
	k.end(next)
}

// TestDamagedSlots: nothing is served with slots that are not sound.
func TestDamagedSlots(t *testing.T) {
	for name, damage := range map[string]func(b []byte){
		"magic":    func(b []byte) { b[0]++ },
		"checksum": func(b []byte) { b[12]++ },
		"version": func(b []byte) {
			b[8]++
			reseal(b)
		},
		"count":     func(b []byte) { wire.PutUint32(b[12:], maxSlots+1); reseal(b) },
		"one less":  func(b []byte) { wire.PutUint32(b[12:], 1); reseal(b) },
		"slot size": func(b []byte) { wire.PutUint32(b[16:], 100); reseal(b) },
	} {
		t.Run(name, func(t *testing.T) {
			k, c := serveFake(t, newMemFile(), Options{}, 2, nil)
			damage(c.slots.mem)
			device, slots := dup(t, int(k.device.Fd())), dup(t, int(k.slots.Fd()))
			if _, err := Adopt(device, slots, newMemFile(), c.opts); !isSlots(err) {
				t.Errorf("%v, want ErrSlots", err)
			}
			k.end(c)
		})
	}
}

// TestOtherVersionEmpty: slots of another version that was stopped in order are replaced.
func TestOtherVersionEmpty(t *testing.T) {
	f := newMemFile()
	k, c := serveFake(t, f, Options{}, 2, nil)
	opts := c.opts
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, pageSize)
	if _, err := k.slots.ReadAt(page, 0); err != nil {
		t.Fatal(err)
	}
	page[8]++
	reseal(page)
	if _, err := k.slots.WriteAt(page, 0); err != nil {
		t.Fatal(err)
	}
	next, err := Adopt(dup(t, int(k.device.Fd())), dup(t, int(k.slots.Fd())), f, opts)
	if err != nil {
		t.Fatal(err)
	}
	if errno, _ := k.call(opGetattr, fileNode, make([]byte, 16)); errno != 0 {
		t.Error(errno)
	}
	k.end(next)
}

// TestAdoptDeadMount: a mount that is gone is not served.
func TestAdoptDeadMount(t *testing.T) {
	k, c := serveFake(t, newMemFile(), Options{}, 2, nil)
	k.end(c)
	if _, err := Adopt(dup(t, int(k.device.Fd())), dup(t, int(k.slots.Fd())), newMemFile(), c.opts); err == nil {
		t.Error("adopted")
	}
}

// TestSlotsBelongToOneProcess: while a process serves, no other gets its slots.
func TestSlotsBelongToOneProcess(t *testing.T) {
	k, c := serveFake(t, newMemFile(), Options{}, 2, nil)
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(k.slots.Fd(), unix.F_GETLK, &lock); err != nil {
		t.Fatal(err)
	}
	// Asked by its owner the lock is no obstacle, so ask for the record of it.
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(k.slots.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("POSIX  ADVISORY  WRITE %d ", os.Getpid()); !bytes.Contains(locks, []byte(want)) {
		t.Errorf("no lock %q in\n%s", want, locks)
	}
	k.end(c)
}

// reseal gives a header of slots its checksum.
func reseal(b []byte) { wire.PutUint32(b[32:], crc32.Checksum(b[:32], castagnoli)) }

func isSlots(err error) bool { return errors.Is(err, ErrSlots) }
