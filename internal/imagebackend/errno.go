package imagebackend

import (
	"errors"
	"syscall"

	"csi-qcow2/qcow2"
)

// errnos gives the error number of each error of an image that is not one of
// the host's. What is not listed is EIO.
var errnos = []struct {
	err   error
	errno syscall.Errno
}{
	{qcow2.ErrReadOnly, syscall.EPERM},
	{qcow2.ErrOutOfRange, syscall.EINVAL},
	{qcow2.ErrTooLarge, syscall.EFBIG},
	{qcow2.ErrClosed, syscall.ESHUTDOWN},
	{qcow2.ErrCorrupt, syscall.EIO},
	{qcow2.ErrFailed, syscall.EIO},
	{errors.ErrUnsupported, syscall.EOPNOTSUPP},
}

// withErrno returns err with a syscall.Errno in its tree. An image that failed
// or is corrupt is EIO whatever the host said at first: the host's error
// number would promise that trying again may help.
func withErrno(err error) error {
	if err == nil {
		return nil
	}
	for _, e := range errnos {
		if errors.Is(err, e.err) {
			return &errnoError{err, e.errno}
		}
	}
	return err
}

// An errnoError is an error of an image with the number that tells it to a
// client.
type errnoError struct {
	err   error
	errno syscall.Errno
}

func (e *errnoError) Error() string { return e.err.Error() }

// Unwrap puts the number first: it decides.
func (e *errnoError) Unwrap() []error { return []error{e.errno, e.err} }
