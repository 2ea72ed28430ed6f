package qcow2

import "io"

// A File is where an image lives: a regular file, or another disk in tests and
// in stacked images. All methods may be called from many goroutines at once.
//
// Durability: nothing but a Datasync that returned nil makes writes, truncates
// and punches that returned before its call survive a power loss. Written
// bytes survive the death of the process as soon as the call has returned.
type File interface {
	// ReadAt reads len(p) bytes at off; at the end of the file it returns
	// fewer bytes and io.EOF, as io.ReaderAt says.
	io.ReaderAt
	// WriteAt writes all of p at off, or returns an error. Writing beyond the
	// end extends the file.
	io.WriterAt
	// WritevAt writes the buffers one after another at off, all or an error.
	WritevAt(bufs [][]byte, off int64) (int, error)
	// Datasync makes the content and the size of the file durable.
	Datasync() error
	// Truncate sets the file size; new bytes read as zeroes.
	Truncate(size int64) error
	// Size returns the file size in bytes.
	Size() (int64, error)
	// Punch gives the space of [off, off+n) back to the host; the range reads
	// as zeroes. It returns errors.ErrUnsupported when the host cannot.
	Punch(off, n int64) error
	// Allocate reserves space for [off, off+n) without changing content; new
	// bytes read as zeroes. It returns errors.ErrUnsupported when the host cannot.
	Allocate(off, n int64) error
	io.Closer
}
