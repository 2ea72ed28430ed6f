package imagefile

import (
	"errors"
	"fmt"
)

// Errors that a caller can act on. Compare with errors.Is.
var (
	// ErrChain: the backing chain is a loop, or too long.
	ErrChain = errors.New("imagefile: backing chain")
	// ErrNoSnapshots: a raw image was asked for an internal snapshot.
	ErrNoSnapshots = errors.New("imagefile: raw images have no internal snapshots")
	// ErrNotOpened: what was read lies in a backing file, and Options.NoBacking left it closed.
	ErrNotOpened = errors.New("imagefile: backing file is not open")
	// ErrProbedHeader: a write would make a probed raw disk look like another format.
	ErrProbedHeader = errors.New("imagefile: the first sector of a probed raw image must not look like an image header; give the format raw")
)

// A BackingError reports a fault below the image Overlay.
type BackingError struct {
	Overlay string
	Err     error
}

func (e *BackingError) Error() string {
	return fmt.Sprintf("backing file of %q: %v", e.Overlay, e.Err)
}

func (e *BackingError) Unwrap() error { return e.Err }

// A FormatError reports an image format that is not supported.
type FormatError struct {
	Name   string // of the image
	Format string
	Probed bool // the file says so; else the caller or an overlay
}

func (e *FormatError) Error() string {
	return fmt.Sprintf("imagefile: %q: format %q is not supported, only qcow2 and raw are", e.Name, e.Format)
}

// A NameError reports a name that cannot be opened.
type NameError struct {
	Name     string
	Protocol string // the protocol, when that is not supported
	Msg      string
}

func (e *NameError) Error() string { return fmt.Sprintf("imagefile: name %q: %s", e.Name, e.Msg) }
