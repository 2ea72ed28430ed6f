package qcow2

import (
	"context"
	"io"
)

// A Disk is a virtual disk as a guest sees it: a qcow2 Image or a Raw file. All
// methods may be called from many goroutines at once. Requests that overlap in
// time and address have no order between them, as on a real disk.
type Disk interface {
	// ReadAt reads len(p) bytes at off. A range beyond Size is ErrOutOfRange;
	// there are no short reads and no io.EOF.
	io.ReaderAt
	// WriteAt writes len(p) bytes at off. When it returns nil, every later
	// ReadAt sees the bytes, also after the death of the process; a power loss
	// may undo it until Flush has returned.
	io.WriterAt
	// WriteZeroes makes [off, off+n) read as zeroes. With unmap the space may
	// be given back to the host. Durability as WriteAt.
	WriteZeroes(off, n int64, unmap bool) error
	// Discard says that the content of [off, off+n) is not needed any more.
	// Whole clusters read as zeroes afterwards; parts of clusters may stay.
	Discard(off, n int64) error
	// Flush returns nil when every write that returned before the call would
	// survive a power loss.
	Flush() error
	// BlockStatus describes the longest range of one state that starts at off,
	// cut to n bytes, over the whole backing chain. n must be greater than 0.
	BlockStatus(ctx context.Context, off, n int64) (Extent, error)
	// Size returns the virtual size in bytes.
	Size() int64
	io.Closer
}

// An Extent is a range of a Disk of one state.
type Extent struct {
	Off, Len   int64
	Allocated  bool // some level of the chain holds a mapping for it (data or zero cluster)
	Data       bool // it has bytes in a host file, at HostOff unless Compressed
	Zero       bool // it reads as zeroes
	Compressed bool
	Depth      int    // level of the chain that holds it: 0 is this image, 1 its backing file, …
	HostOff    int64  // host offset of Off where a cluster of its own is kept for it, zero clusters included; else -1
	File       string // name of the host file of HostOff, "" if unknown
}

// End returns the offset after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }
