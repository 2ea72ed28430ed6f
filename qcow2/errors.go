package qcow2

import (
	"errors"
	"fmt"
)

// Errors that a caller can act on. Compare with errors.Is.
var (
	// ErrCorrupt: a structure of the image contradicts the specification or itself.
	// Every *FormatError matches it.
	ErrCorrupt = errors.New("qcow2: image is corrupt")
	// ErrNotQcow2: the file does not begin with the qcow2 magic.
	ErrNotQcow2 = errors.New("qcow2: not a qcow2 image")
	// ErrUnsupported: the image is valid but needs a feature that this package lacks.
	ErrUnsupported = errors.New("qcow2: unsupported feature")
	// ErrReadOnly: a change was asked of an image that was opened read-only.
	ErrReadOnly = errors.New("qcow2: image is read-only")
	// ErrClosed: the image was used after Close.
	ErrClosed = errors.New("qcow2: image is closed")
	// ErrFailed: an earlier metadata write or sync failed; the image must be closed, reopened and verified.
	ErrFailed = errors.New("qcow2: image failed, reopen it")
	// ErrOutOfRange: offset and length do not lie inside the virtual size.
	ErrOutOfRange = errors.New("qcow2: out of range")
	// ErrLocked: another process holds the image's lock.
	ErrLocked = errors.New("qcow2: image is in use by another process")
	// ErrSnapshotNotFound: no internal snapshot has this ID or name.
	ErrSnapshotNotFound = errors.New("qcow2: no such snapshot")
	// ErrSnapshotExists: an internal snapshot has this ID already.
	ErrSnapshotExists = errors.New("qcow2: snapshot exists")
	// ErrTooManySnapshots: the snapshot table is at its limit.
	ErrTooManySnapshots = errors.New("qcow2: too many snapshots")
	// ErrRefcountOverflow: a cluster would need a refcount beyond the image's refcount width.
	ErrRefcountOverflow = errors.New("qcow2: refcount overflow")
	// ErrTooLarge: the image cannot grow to the size that was asked for.
	ErrTooLarge = errors.New("qcow2: size beyond the limit of the format")
)

// A FormatError reports a structure that is not what the specification requires.
// It matches ErrCorrupt.
type FormatError struct {
	Struct string     // "L2 table", "refcount block", …
	Off    HostOffset // where the structure or its entry starts in the image file
	Msg    string     // what is wrong with it
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("qcow2: %s at %#x: %s", e.Struct, uint64(e.Off), e.Msg)
}

// Is reports whether target is ErrCorrupt.
func (e *FormatError) Is(target error) bool { return target == ErrCorrupt }

// corruptf returns a *FormatError for the structure at off.
func corruptf(structure string, off HostOffset, format string, args ...any) error {
	return &FormatError{Struct: structure, Off: off, Msg: fmt.Sprintf(format, args...)}
}
