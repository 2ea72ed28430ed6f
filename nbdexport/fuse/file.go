package fuse

import (
	"errors"
	"io"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrUnanswered is what a change of a File returns that is for the next process to
// do: the request stays in its slot, without an answer, and the slot's reader ends.
var ErrUnanswered = errors.New("fuse: the request is left to the next process")

// A File is the content of the one file of a mount. Its methods may be called at
// once, for ranges inside the file; memory for multiples of 4096 bytes is
// aligned to that. An error with a syscall.Errno in its tree gives its number to
// the answer, see errnoOf. WriteAt and WriteZeroes may return ErrUnanswered when Close
// will be called.
type File interface {
	// ReadAt reads all of p or returns an error.
	io.ReaderAt
	// WriteAt writes all of p or returns an error. A process that was killed in it is
	// followed by one that calls it again with the same arguments.
	io.WriterAt
	// WriteZeroes makes [off, off+n) read as zeroes, and may unmap it.
	WriteZeroes(off, n int64, unmap bool) error
	// Flush makes durable what has returned before.
	Flush() error
}

// errnoOf is the error number of a File's error, EIO when it has none that the
// kernel's block layer tells apart.
func errnoOf(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return unix.EIO
	}
	switch errno {
	case unix.ENOSPC, unix.EDQUOT:
		return unix.ENOSPC
	case unix.EROFS, unix.EPERM, unix.ENOMEM, unix.EOPNOTSUPP, unix.EINVAL:
		return errno
	}
	return unix.EIO
}
