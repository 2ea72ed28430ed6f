package cache

import (
	"errors"
	"fmt"
)

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
	// ErrArena is matched by *ArenaError.
	ErrArena = errors.New("cache: unusable arena")
	// ErrArenaLayout is matched by an *ArenaError about an arena that is most
	// likely sound, but laid out by another version of this package.
	ErrArenaLayout = errors.New("cache: arena of another layout")
	// ErrUnclaimed is returned by Get and Create when all ways of a set hold
	// dirty tables of images that a predecessor had open and this process has not
	// opened in Options.ClaimWait. Open or Forget what Unclaimed lists, and try again.
	ErrUnclaimed = errors.New("cache: no room beside the tables of images that are not open yet")
)

// An ArenaError says why an arena file was refused. Nothing in it was used or
// changed. What its process had not written back is lost, as by a power loss;
// Options.Fresh goes on without it. It matches ErrArena.
type ArenaError struct {
	Path   string
	Msg    string
	Layout bool // it matches ErrArenaLayout as well
}

func (e *ArenaError) Error() string {
	return fmt.Sprintf("cache: arena %q is not usable: %s", e.Path, e.Msg)
}

// Is reports whether target is ErrArena, or ErrArenaLayout where that is so.
func (e *ArenaError) Is(target error) bool {
	return target == ErrArena || (target == ErrArenaLayout && e.Layout)
}
