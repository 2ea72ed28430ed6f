package fuse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// A memFile is a File in memory that fails when told to.
type memFile struct {
	mu     sync.Mutex
	b      []byte // guarded by mu
	err    error  // of every call; guarded by mu
	during func() // called in the middle of a change; guarded by mu
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return copy(p, f.b[off:off+int64(len(p))]), f.err
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	err, during := f.err, f.during
	if err == nil {
		copy(f.b[off:], p[:len(p)/2])
	}
	f.mu.Unlock()
	if during != nil {
		during()
	}
	if err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return copy(f.b[off:off+int64(len(p))], p), nil
}

func (f *memFile) WriteZeroes(off, n int64, _ bool) error {
	_, err := f.WriteAt(make([]byte, n), off)
	return err
}

func (f *memFile) Flush() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *memFile) set(off int, b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	copy(f.b[off:], b)
}

func (f *memFile) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

func (f *memFile) interpose(during func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.during = during
}

func (f *memFile) get(off, n int) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return bytes.Clone(f.b[off : off+n])
}

// A fakeKernel is the other end of a device that keeps messages apart as /dev/fuse does.
type fakeKernel struct {
	t      testing.TB
	fd     int
	device *os.File // a copy of the server's end, as a holder has it
	slots  *os.File
	unique uint64
}

const fileSize = 1 << 20

// serveFake serves f to a fake kernel with n slots. at is as in newConn.
func serveFake(t testing.TB, f File, o Options, n int, at func(point)) (*fakeKernel, *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 4<<20)
	}
	unix.SetNonblock(fds[1], false)
	unix.SetsockoptTimeval(fds[1], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 300})
	sl, err := newSlots(n, maxData)
	if err != nil {
		t.Fatal(err)
	}
	k := &fakeKernel{t: t, fd: fds[1], device: dup(t, fds[0]), slots: dup(t, int(sl.file.Fd()))}
	t.Cleanup(func() { k.device.Close(); k.slots.Close() })
	o.Name, o.Size = "file", fileSize
	c, err := newConn(fds[0], sl, f, o, at)
	if err != nil {
		t.Fatal(err)
	}
	return k, c
}

func dup(t testing.TB, fd int) *os.File {
	t.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(n), "copy")
}

// send sends a request with the given parts and returns its number.
func (k *fakeKernel) send(op opcode, node uint64, parts ...[]byte) uint64 {
	k.t.Helper()
	k.unique += 2
	body := bytes.Join(parts, nil)
	b := make([]byte, inHeaderSize, inHeaderSize+len(body))
	h := inHeader{len: uint32(inHeaderSize + len(body)), opcode: op, unique: k.unique, nodeID: node}
	h.encode(b)
	k.sendRaw(append(b, body...))
	return k.unique
}

func (k *fakeKernel) sendRaw(b []byte) {
	k.t.Helper()
	if _, err := again(unix.Write, k.fd, b); err != nil {
		k.t.Fatal(err)
	}
}

// again makes a call until no signal interrupts it. The runtime's preemption is one, and a
// socket with a timeout does not restart what it interrupts.
func again(call func(fd int, b []byte) (int, error), fd int, b []byte) (n int, err error) {
	for {
		if n, err = call(fd, b); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// receive returns the next answer.
func (k *fakeKernel) receive() (unique uint64, errno unix.Errno, body []byte) {
	k.t.Helper()
	b := make([]byte, 2*maxData)
	n, err := again(unix.Read, k.fd, b)
	if err != nil || n < outHeaderSize {
		k.t.Fatalf("answer: %d bytes, %v", n, err)
	}
	if got := binary.NativeEndian.Uint32(b); int(got) != n {
		k.t.Fatalf("an answer of %d bytes says that it has %d", n, got)
	}
	return binary.NativeEndian.Uint64(b[8:]), unix.Errno(-int32(binary.NativeEndian.Uint32(b[4:]))), b[outHeaderSize:n]
}

// call sends a request and returns its answer.
func (k *fakeKernel) call(op opcode, node uint64, parts ...[]byte) (unix.Errno, []byte) {
	k.t.Helper()
	sent := k.send(op, node, parts...)
	unique, errno, body := k.receive()
	if unique != sent {
		k.t.Fatalf("answer to %d, want %d", unique, sent)
	}
	return errno, body
}

func ioArgs(off uint64, size int) []byte {
	b := make([]byte, ioInSize)
	(&ioIn{off: off, size: uint32(size)}).encode(b)
	return b
}

func fallocateArgs(off, n uint64, mode uint32) []byte {
	b := make([]byte, fallocateInSize)
	(&fallocateIn{off: off, length: n, mode: mode}).encode(b)
	return b
}

func newMemFile() *memFile { return &memFile{b: bytes.Repeat([]byte{0xee}, fileSize)} }

// end closes c after its mount has gone.
func (k *fakeKernel) end(c *Conn) {
	k.t.Helper()
	unix.Close(k.fd)
	<-c.Done()
	if err := c.Close(); err != nil {
		k.t.Error(err)
	}
}

func TestRequests(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := newMemFile()
	k, c := serveFake(t, f, Options{Discard: true}, 4, nil)
	data := bytes.Repeat([]byte("abcdefgh"), maxData/8)
	const punch, zero = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
	u32 := func(v ...uint32) []byte {
		var b []byte
		for _, v := range v {
			b = binary.NativeEndian.AppendUint32(b, v)
		}
		return b
	}
	for _, tt := range []struct {
		name  string
		op    opcode
		node  uint64
		body  []byte
		errno unix.Errno
		size  int // of the answer
	}{
		{"init", opInit, 0, append(u32(7, 45, 0, 0xffffffff), make([]byte, 48)...), 0, initOutSize},
		{"init of an old kernel", opInit, 0, u32(7, 27, 0, 0), unix.EPROTO, 0},
		{"short init", opInit, 0, u32(7, 45), unix.EINVAL, 0},
		{"lookup", opLookup, rootNode, []byte("file\x00"), 0, entryOutSize},
		{"lookup of another name", opLookup, rootNode, []byte("files\x00"), unix.ENOENT, 0},
		{"lookup without an end", opLookup, rootNode, []byte("file"), unix.ENOENT, 0},
		{"lookup below the file", opLookup, fileNode, []byte("file\x00"), unix.ENOENT, 0},
		{"getattr", opGetattr, fileNode, make([]byte, 16), 0, attrOutSize},
		{"getattr of nothing", opGetattr, 7, make([]byte, 16), unix.ENOENT, 0},
		{"setattr", opSetattr, fileNode, make([]byte, 88), unix.EPERM, 0},
		{"open", opOpen, fileNode, u32(unix.O_RDWR, 0), 0, openOutSize},
		{"short open", opOpen, fileNode, nil, unix.EINVAL, 0},
		{"opendir", opOpendir, rootNode, u32(0, 0), 0, openOutSize},
		{"readdir", opReaddir, rootNode, ioArgs(0, 4096), 0, 32},
		{"readdir at its end", opReaddir, rootNode, ioArgs(1, 4096), 0, 0},
		{"readdir without room", opReaddir, rootNode, ioArgs(0, 16), 0, 0},
		{"short readdir", opReaddir, rootNode, nil, unix.EINVAL, 0},
		{"statfs", opStatfs, rootNode, nil, 0, statfsSize},
		{"write", opWrite, fileNode, append(ioArgs(4096, len(data)), data...), 0, writeOutSize},
		{"write of nothing", opWrite, fileNode, ioArgs(0, 0), 0, writeOutSize},
		{"write beyond the end", opWrite, fileNode, append(ioArgs(fileSize-1, 2), "ab"...), unix.EFBIG, 0},
		{"write around the end of numbers", opWrite, fileNode, append(ioArgs(1<<64-1, 2), "ab"...), unix.EFBIG, 0},
		{"write that says too much", opWrite, fileNode, append(ioArgs(0, 3), "ab"...), unix.EINVAL, 0},
		{"short write", opWrite, fileNode, make([]byte, 8), unix.EINVAL, 0},
		{"read", opRead, fileNode, ioArgs(4096, len(data)), 0, len(data)},
		{"read across the end", opRead, fileNode, ioArgs(fileSize-10, 4096), 0, 10},
		{"read behind the end", opRead, fileNode, ioArgs(1<<63, 4096), 0, 0},
		{"read of too much", opRead, fileNode, ioArgs(0, maxData+1), unix.EINVAL, 0},
		{"read of the root", opRead, rootNode, ioArgs(0, 1), unix.EINVAL, 0},
		{"short read", opRead, fileNode, nil, unix.EINVAL, 0},
		{"fsync", opFsync, fileNode, make([]byte, 16), 0, 0},
		{"hole", opFallocate, fileNode, fallocateArgs(0, 4096, punch), 0, 0},
		{"hole of nothing", opFallocate, fileNode, fallocateArgs(0, 0, punch), 0, 0},
		{"zeroes", opFallocate, fileNode, fallocateArgs(0, 4096, zero), 0, 0},
		{"zeroes beyond the end", opFallocate, fileNode, fallocateArgs(fileSize, 1, zero), unix.EFBIG, 0},
		{"allocation", opFallocate, fileNode, fallocateArgs(0, 4096, 0), unix.EOPNOTSUPP, 0},
		{"short fallocate", opFallocate, fileNode, nil, unix.EINVAL, 0},
		{"flush", opFlush, fileNode, make([]byte, 24), 0, 0},
		{"release", opRelease, fileNode, make([]byte, 24), 0, 0},
		{"releasedir", opReleasedir, rootNode, make([]byte, 24), 0, 0},
		{"destroy", opDestroy, 0, nil, 0, 0},
		{"lseek", 46, fileNode, make([]byte, 24), unix.ENOSYS, 0},
		{"interrupt", 36, 0, make([]byte, 8), unix.ENOSYS, 0},
		{"a long request without a meaning", 4711, 0, data, unix.ENOSYS, 0},
	} {
		k.send(opForget, fileNode, make([]byte, 8)) // no answer, and no harm
		errno, body := k.call(tt.op, tt.node, tt.body)
		if errno != tt.errno || len(body) != tt.size {
			t.Errorf("%s: %v and %d bytes; want %v and %d", tt.name, errno, len(body), tt.errno, tt.size)
		}
		if tt.name == "read" && !bytes.Equal(body, data) {
			t.Error("read: not what was written")
		}
	}
	f.fail(fmt.Errorf("disk: %w", unix.ENOSPC))
	if errno, _ := k.call(opWrite, fileNode, ioArgs(0, 1), []byte("x")); errno != unix.ENOSPC {
		t.Errorf("write to a full file: %v, want ENOSPC", errno)
	}
	f.fail(errors.New("broken"))
	if errno, _ := k.call(opRead, fileNode, ioArgs(0, 1)); errno != unix.EIO {
		t.Errorf("read of a broken file: %v, want EIO", errno)
	}
	if errno, _ := k.call(opFsync, fileNode, make([]byte, 16)); errno != unix.EIO {
		t.Errorf("fsync of a broken file: %v, want EIO", errno)
	}
	k.end(c)
}

func TestReadOnlyRequests(t *testing.T) {
	k, c := serveFake(t, newMemFile(), Options{ReadOnly: true}, 2, nil)
	for _, tt := range []struct {
		op   opcode
		body []byte
		want unix.Errno
	}{
		{opOpen, []byte{unix.O_RDWR, 0, 0, 0, 0, 0, 0, 0}, unix.EROFS},
		{opOpen, make([]byte, 8), 0},
		{opWrite, append(ioArgs(0, 1), 'x'), unix.EROFS},
		{opFallocate, fallocateArgs(0, 1, unix.FALLOC_FL_ZERO_RANGE), unix.EROFS},
	} {
		if errno, _ := k.call(tt.op, fileNode, tt.body); errno != tt.want {
			t.Errorf("%d: %v, want %v", tt.op, errno, tt.want)
		}
	}
	k.end(c)
}

// TestHoleWithoutDiscard: the kernel must write the zeroes itself.
func TestHoleWithoutDiscard(t *testing.T) {
	k, c := serveFake(t, newMemFile(), Options{}, 2, nil)
	if errno, _ := k.call(opFallocate, fileNode, fallocateArgs(0, 4096, unix.FALLOC_FL_PUNCH_HOLE)); errno != unix.EOPNOTSUPP {
		t.Errorf("%v, want EOPNOTSUPP", errno)
	}
	k.end(c)
}

// TestMoreReadersForASlowFile: requests are executed beside each other, as many as there are slots.
func TestMoreReadersForASlowFile(t *testing.T) {
	f := newMemFile()
	block := make(chan struct{})
	entered := make(chan struct{}, maxReaders)
	f.interpose(func() { time.Sleep(2 * slowRequest) })
	k, c := serveFake(t, f, Options{}, maxReaders, nil)
	for n := 0; n < maxReaders; {
		for range 64 {
			k.send(opWrite, fileNode, ioArgs(0, 1), []byte("x"))
		}
		for range 64 {
			k.receive()
		}
		c.mu.Lock()
		n = c.readers
		c.mu.Unlock()
	}
	f.interpose(func() { entered <- struct{}{}; <-block })
	for range maxReaders {
		k.send(opWrite, fileNode, ioArgs(0, 1), []byte("x"))
	}
	for range maxReaders {
		<-entered
	}
	close(block)
	for range maxReaders {
		k.receive()
	}
	k.end(c)
}

// TestCloseAnswersFirst: what was read is answered, what was not stays for a successor.
func TestCloseAnswersFirst(t *testing.T) {
	defer goleak.VerifyNone(t)
	f := newMemFile()
	entered, block := make(chan struct{}, 1), make(chan struct{})
	f.interpose(func() { entered <- struct{}{}; <-block })
	k, c := serveFake(t, f, Options{}, 1, nil)
	first := k.send(opWrite, fileNode, ioArgs(0, 1), []byte("x"))
	<-entered
	closed := make(chan error)
	go func() { closed <- c.Close() }()
	second := k.send(opGetattr, fileNode, make([]byte, 16))
	close(block)
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	if unique, errno, _ := k.receive(); unique != first || errno != 0 {
		t.Fatalf("answer to %d: %v", unique, errno)
	}
	next, err := Adopt(k.device, k.slots, f, c.opts)
	if err != nil {
		t.Fatal(err)
	}
	for {
		unique, errno, _ := k.receive()
		if unique == second && errno == 0 {
			break
		}
		if unique != first {
			t.Fatalf("answer to %d: %v", unique, errno)
		}
	}
	k.end(next)
}

// kill ends a reader where it is, as the end of its process does.
func kill() { runtime.Goexit() }
