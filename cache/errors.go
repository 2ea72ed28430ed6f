package cache

import "errors"

var (
	// ErrClosed is returned by the methods of a closed Cache or Handle.
	ErrClosed = errors.New("cache: closed")
	// ErrInUse is returned by Cache.Close while handles are open, by Open for an
	// image that is open already, and by New for an arena that another process
	// (or another Cache of this one) serves.
	ErrInUse = errors.New("cache: in use")
	// ErrInvalid is matched by errors about a caller's mistake: options out of
	// range, an offset that is not aligned, a class that the handle lacks.
	ErrInvalid = errors.New("cache: invalid argument")
)
