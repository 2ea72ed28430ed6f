package volume

import "errors"

// Errors that a caller can act on. Compare with errors.Is.
var (
	// ErrInvalid: an argument is malformed; the text says which and what is allowed.
	ErrInvalid = errors.New("volume: invalid argument")
	// ErrNotFound: no such volume or snapshot.
	ErrNotFound = errors.New("volume: not found")
	// ErrIncompatible: the name exists and was made from other arguments.
	ErrIncompatible = errors.New("volume: exists with other properties")
	// ErrOutOfRange: no size satisfies the request.
	ErrOutOfRange = errors.New("volume: size out of range")
	// ErrInUse: the volume is attached.
	ErrInUse = errors.New("volume: in use")
	// ErrBusy: another operation on the same volume or name is under way.
	ErrBusy = errors.New("volume: operation in progress")
	// ErrNoSpace: the pool cannot hold what was asked for.
	ErrNoSpace = errors.New("volume: no space in the pool")
	// ErrTooDeep: the chain of clones is at its limit.
	ErrTooDeep = errors.New("volume: too many clones of clones")
	// ErrBadToken: a list token that no list returned.
	ErrBadToken = errors.New("volume: invalid list token")
	// ErrDamaged: a record or an image header does not decode; see the text.
	ErrDamaged = errors.New("volume: damaged")
	// ErrPoolInUse: another process owns the pool.
	ErrPoolInUse = errors.New("volume: pool is in use by another process")
	// ErrNotPool: the directory is not a pool and not empty, or its layout is unknown.
	ErrNotPool = errors.New("volume: not a pool")
	// ErrClosed: the pool was used after Close.
	ErrClosed = errors.New("volume: pool is closed")
)
