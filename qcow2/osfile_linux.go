package qcow2

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileOptions say how OpenFile opens a host file. The zero value opens a
// regular file or block device read-write, through the page cache, without a lock.
type FileOptions struct {
	ReadOnly bool
	// Direct bypasses the page cache (O_DIRECT). Requests that are not aligned
	// as the host wants it go through a bounce buffer; see OSFile.
	Direct bool
	// NoFollow refuses a path whose last component is a symbolic link.
	NoFollow bool
	// Lock is taken on the file before it is used, and dropped by Close.
	Lock LockMode
}

// An OSFile is a File of the operating system: a regular file or a block device.
//
// ReadAt, WriteAt and WritevAt do not allocate. No call may be under way when
// Close is called: the number of a closed descriptor may already belong to
// another file. Calls after Close return os.ErrClosed.
//
// With O_DIRECT, a request whose offset, length or memory is not aligned is
// split: a read goes through an aligned buffer; a write reads the blocks at its
// edges, changes them and writes them back, alone in the file meanwhile, so
// that a neighbour in the same block is not undone. Aligned requests run
// concurrently and are not copied.
//
// Through the page cache, Linux admits one write to a regular file at a time, by
// the lock of its inode, and whoever waits for that spins. A write that inTurn is
// for waits for the one before it parked instead, so that its CPU is there for others.
type OSFile struct {
	fd   atomic.Int64 // -1 after Close
	f    *os.File
	name string

	direct     bool
	memAlign   uintptr      // of the memory of a direct request
	blockAlign int64        // of offset and length of a direct request
	rmw        sync.RWMutex // direct writes: shared by aligned ones, held alone over the I/O of an unaligned one

	oneWriter bool       // the kernel admits one write at a time
	turn      sync.Mutex // with oneWriter: held over the I/O of a write that inTurn is for

	sync  sync.Mutex    // one Datasync at a time; held over it
	syncs atomic.Uint64 // how many have begun; changed under sync
	lost  error         // of the first Datasync that failed; guarded by sync
}

var _ File = (*OSFile)(nil)

// inTurn reports whether a write of n bytes waits parked for others. A shorter one takes
// the kernel less time than it takes to be woken. Longer ones come from copies as a
// rule, which have nothing else to do with the CPU, and are done sooner if they spin.
func (f *OSFile) inTurn(n int) bool { return f.oneWriter && n >= 16<<10 && n < 512<<10 }

// OpenFile opens the existing file path. Errors: those of open(2) as
// *fs.PathError, and a *LockError, which matches ErrLocked.
func OpenFile(path string, o FileOptions) (*OSFile, error) {
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK // opening a FIFO must not wait; files do not care
	if o.ReadOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if o.Direct {
		flags |= unix.O_DIRECT
	}
	if o.NoFollow {
		flags |= unix.O_NOFOLLOW
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		if o.Direct && errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("%w (the file system may not support O_DIRECT)", err)
		}
		return nil, err
	}
	file, err := NewOSFile(f, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return file, nil
}

// NewOSFile makes a File of f, which must have been opened as o says, and locks
// it. On success it owns f.
func NewOSFile(f *os.File, o FileOptions) (*OSFile, error) {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return nil, &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
	case unix.S_IFDIR:
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: unix.EISDIR}
	default:
		return nil, &os.PathError{Op: "open", Path: f.Name(), Err: errors.New("not a regular file or block device")}
	}
	if err := lockFile(fd, f.Name(), o.Lock); err != nil {
		unlockFile(fd)
		return nil, err
	}
	of := &OSFile{f: f, name: f.Name(), direct: o.Direct}
	of.oneWriter = !o.Direct && st.Mode&unix.S_IFMT == unix.S_IFREG
	if o.Direct {
		of.memAlign, of.blockAlign = directAlignment(fd)
	}
	of.fd.Store(int64(fd))
	return of, nil
}

// Name returns the path that the file was opened by.
func (f *OSFile) Name() string { return f.name }

// Lock takes the locks of m, too, and keeps those that the file holds. After an
// error it may hold some of them until Close.
func (f *OSFile) Lock(m LockMode) error { return lockFile(int(f.fd.Load()), f.name, m) }

// Stat returns the file's os.FileInfo, by which two paths of one file are told.
func (f *OSFile) Stat() (os.FileInfo, error) { return f.f.Stat() }

// Close drops the locks and closes the file.
func (f *OSFile) Close() error {
	fd := f.fd.Swap(-1)
	if fd < 0 {
		return f.wrap("close", os.ErrClosed)
	}
	unlockFile(int(fd))
	return f.f.Close()
}

// ReadAt implements File.
func (f *OSFile) ReadAt(p []byte, off int64) (int, error) {
	if f.direct && !f.alignedFor(p, off) {
		return f.readBounced(p, off)
	}
	return f.pread(p, off)
}

// WriteAt implements File.
func (f *OSFile) WriteAt(p []byte, off int64) (int, error) {
	if !f.direct {
		if f.inTurn(len(p)) {
			f.turn.Lock()
			defer f.turn.Unlock()
		}
		return f.pwrite(p, off)
	}
	if f.alignedFor(p, off) {
		f.rmw.RLock()
		defer f.rmw.RUnlock()
		return f.pwrite(p, off)
	}
	return f.writeBounced(p, off)
}

// WritevAt implements File.
func (f *OSFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	if f.direct {
		aligned := true
		for _, b := range bufs {
			aligned = aligned && f.alignedFor(b, off)
		}
		if !aligned {
			return f.writeEach(bufs, off)
		}
		f.rmw.RLock()
		defer f.rmw.RUnlock()
	}
	if f.inTurn(totalBytes(bufs)) {
		f.turn.Lock()
		defer f.turn.Unlock()
	}
	return f.pwritev(bufs, off)
}

// writeEach writes bufs one call after another.
func (f *OSFile) writeEach(bufs [][]byte, off int64) (int, error) {
	done := 0
	for _, b := range bufs {
		n, err := f.WriteAt(b, off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// totalBytes returns the length of bufs together.
func totalBytes(bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

// pread reads until p is full or the file ends.
func (f *OSFile) pread(p []byte, off int64) (int, error) {
	fd := int(f.fd.Load())
	done := 0
	for done < len(p) {
		n, err := unix.Pread(fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, f.wrap("read", err)
		case n == 0:
			return done, io.EOF
		default:
			done += n
		}
	}
	return done, nil
}

// pwrite writes all of p.
func (f *OSFile) pwrite(p []byte, off int64) (int, error) {
	fd := int(f.fd.Load())
	done := 0
	for done < len(p) {
		n, err := unix.Pwrite(fd, p[done:], off+int64(done))
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, f.wrap("write", err)
		case n == 0:
			return done, f.wrap("write", io.ErrShortWrite)
		default:
			done += n
		}
	}
	return done, nil
}

// maxVector is IOV_MAX of Linux.
const maxVector = 1024

// pwritev writes all of bufs. unix.Pwritev keeps up to 8 vectors on the stack.
func (f *OSFile) pwritev(bufs [][]byte, off int64) (int, error) {
	fd := int(f.fd.Load())
	done := 0
	for len(bufs) > 0 {
		n, err := unix.Pwritev(fd, bufs[:min(len(bufs), maxVector)], off+int64(done))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return done, f.wrap("write", err)
		}
		done += n
		written := n
		for len(bufs) > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 { // cut inside bufs[0]; bufs is the caller's and stays as it is
			m, err := f.pwrite(bufs[0][n:], off+int64(done))
			done += m
			if err != nil {
				return done, err
			}
			bufs = bufs[1:]
		} else if written == 0 && len(bufs) > 0 {
			return done, f.wrap("write", io.ErrShortWrite)
		}
	}
	return done, nil
}

// Datasync implements File. Once it has failed it always does: the kernel tells of
// lost writes once, and of two calls at a time only one. So one runs at a time, and
// all who come while it does share the next.
func (f *OSFile) Datasync() error { return f.datasyncAfter(f.syncs.Load()) }

// datasyncAfter is Datasync for a caller that came when seen had begun.
func (f *OSFile) datasyncAfter(seen uint64) error {
	f.sync.Lock()
	defer f.sync.Unlock()
	if f.lost == nil && f.syncs.Load() == seen {
		f.syncs.Add(1)
		f.lost = f.wrap("fdatasync", ignoringEINTR(func() error { return unix.Fdatasync(int(f.fd.Load())) }))
	}
	return f.lost
}

// Truncate implements File.
func (f *OSFile) Truncate(size int64) error {
	return f.wrap("truncate", ignoringEINTR(func() error { return unix.Ftruncate(int(f.fd.Load()), size) }))
}

// Size implements File.
func (f *OSFile) Size() (int64, error) {
	fd := int(f.fd.Load())
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, f.wrap("stat", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return st.Size, nil
	}
	size, err := unix.Seek(fd, 0, io.SeekEnd)
	return size, f.wrap("seek", err)
}

// Punch implements File.
func (f *OSFile) Punch(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// ZeroRange makes [off, off+n) read as zeroes and keeps its space. It returns
// errors.ErrUnsupported when the host cannot.
func (f *OSFile) ZeroRange(off, n int64) error {
	return f.fallocate(unix.FALLOC_FL_ZERO_RANGE, off, n)
}

// Allocate implements File.
func (f *OSFile) Allocate(off, n int64) error { return f.fallocate(0, off, n) }

func (f *OSFile) fallocate(mode uint32, off, n int64) error {
	err := ignoringEINTR(func() error { return unix.Fallocate(int(f.fd.Load()), mode, off, n) })
	switch err {
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.ENODEV, unix.ENOTTY:
		return f.wrap("fallocate", errors.ErrUnsupported)
	}
	return f.wrap("fallocate", err)
}

// NextData returns the first range of [off, end) that the host stores data
// for: [start, stop). When there is none, start and stop are end. A host that
// cannot tell says that everything is data.
func (f *OSFile) NextData(off, end int64) (start, stop int64, err error) {
	start, err = f.DataAfter(off)
	if err != nil || start >= end {
		return end, end, err
	}
	stop, err = unix.Seek(int(f.fd.Load()), start, unix.SEEK_HOLE)
	if err == unix.EINVAL {
		return start, end, nil
	}
	return start, min(stop, end), f.wrap("seek", err)
}

// DataAfter returns the first offset from off on that the host stores data
// for, or math.MaxInt64. A host that cannot tell says off.
func (f *OSFile) DataAfter(off int64) (int64, error) {
	start, err := unix.Seek(int(f.fd.Load()), off, unix.SEEK_DATA)
	switch err {
	case unix.ENXIO:
		return math.MaxInt64, nil
	case unix.EINVAL:
		return off, nil
	}
	return start, f.wrap("seek", err)
}

// wrap adds the operation and the path to err; nil stays nil.
func (f *OSFile) wrap(op string, err error) error {
	if err == nil {
		return nil
	}
	if f.fd.Load() < 0 {
		err = os.ErrClosed
	}
	return &os.PathError{Op: op, Path: f.name, Err: err}
}

// ignoringEINTR calls fn until a signal does not interrupt it.
func ignoringEINTR(fn func() error) error {
	for {
		if err := fn(); err != unix.EINTR {
			return err
		}
	}
}
