package nbdexport

import (
	"context"
	"io"
)

// A Backend is what an Export serves: the content of one virtual disk.
//
// Concurrency: all methods may be called from many goroutines at once, for any
// ranges. Requests that overlap in time and address have no order between
// them, but each byte that a ReadAt returns was there at some moment between
// its call and its return.
//
// Arguments: the server calls with off >= 0, n > 0 and off+n <= Size(), checked
// against the Size of that moment. It knows of no block size: ranges may start
// and end at any byte. The memory of p is 4096-byte aligned when the length is
// a multiple of 4096 and the Backend implements AlignedWriter; p is the
// server's again when the call has returned.
//
// Errors: a syscall.Errno anywhere in the error's tree becomes the NBD error
// of the reply (see wireError): ENOSPC and EDQUOT when the host is full, EIO
// for what the medium or the format lost, EPERM and EROFS for a write to a
// read-only image, EINVAL for a range that is outside after all, EOPNOTSUPP
// when a fast zero would be slow. Anything else becomes EIO. After an error
// of WriteAt, WriteZeroes or Discard the range holds old or new bytes. WriteAt,
// WriteZeroes and WriteZeroesFast may return ErrUnanswered shortly before
// [Device.Leave]; at any other time whoever waits for the reply would do so for ever.
//
// Durability: what WriteAt, WriteZeroes and Discard did is seen by every later
// call once they return, and survives the death of the process. Flush makes
// it survive a power loss: when it returns nil, so does everything that had
// returned before Flush was called, whichever goroutine or connection did it.
// (This is what lets an Export announce that several connections are safe.)
type Backend interface {
	// ReadAt reads len(p) bytes at off, all of them or an error: there are no
	// short reads and no io.EOF.
	io.ReaderAt
	// WriteAt writes len(p) bytes at off, all of them or an error.
	io.WriterAt
	// WriteZeroes makes [off, off+n) read as zeroes. With unmap it may give
	// the space back to the host; without, the space stays allocated.
	WriteZeroes(off, n int64, unmap bool) error
	// Discard says that the content of [off, off+n) is not needed any more. It
	// is advice: afterwards the range reads as it did, or as zeroes.
	Discard(off, n int64) error
	// Flush makes everything that returned before its call durable.
	Flush() error
	// BlockStatus describes a range of one state that starts at off and is
	// from 1 to n bytes long. Adjacent ranges may have equal states. It
	// returns early with ctx.Err() when ctx ends.
	BlockStatus(ctx context.Context, off, n int64) (Extent, error)
	// Size returns the size in bytes. It may grow while the Backend is
	// served, never shrink, and costs no I/O.
	Size() int64
}

// An Extent is a range of a Backend of one state. It starts at the offset that
// BlockStatus was asked for.
type Extent struct {
	Len   int64 // bytes
	Hole  bool  // no space is allocated for its content (NBD_STATE_HOLE)
	Zero  bool  // it reads as zeroes (NBD_STATE_ZERO)
	Depth int   // of the image in the backing chain that maps it: 1 is the top, 2 its backing file; 0 when none does
}

// A FastZeroer is a Backend that can tell when zeroing is no faster than
// writing zeroes.
type FastZeroer interface {
	// WriteZeroesFast is WriteZeroes, but it changes nothing and returns
	// syscall.EOPNOTSUPP when it would have to write the zeroes out.
	WriteZeroesFast(off, n int64, unmap bool) error
}

// A Cacher is a Backend that can bring content closer in advance of its use.
type Cacher interface {
	// Cache prepares for reads of [off, off+n), and may do nothing.
	Cache(off, n int64) error
}

// A SparseReader is a Backend whose BlockStatus costs so little that large
// reads should ask it first and answer zeroes without reading them.
type SparseReader interface {
	// SparseReads reports whether that is so.
	SparseReads() bool
}

// A GranularWriter is a Backend to which parts of a granule, a range of some length
// at a multiple of it, may cost as much as all of it. Without it there is none.
type GranularWriter interface {
	// WriteGranule returns the length of a granule in bytes.
	WriteGranule() int64
}

// An AlignedWriter is a Backend that wants its memory aligned, because it
// passes it on to files opened with O_DIRECT.
type AlignedWriter interface {
	// WantsAligned reports whether unaligned memory would cost it a copy.
	WantsAligned() bool
}
