package cache

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// mapFile maps the arena file at path, locked until unmap: a new one, or what
// a predecessor left, together with its dirty entries.
func mapFile(path string, slots int, generation uint64, fresh bool) (*arena, []entry, error) {
	boot, err := readBootID()
	if err != nil {
		return nil, nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("cache: open arena: %w", err)
	}
	want := header{slots: uint64(slots), bootID: boot, generation: generation}
	if err := lockFile(f); err != nil {
		return nil, nil, errors.Join(err, closeLocked(f))
	}
	if !fresh {
		a, left, err := mapLeft(f, want)
		if err != nil {
			return nil, nil, errors.Join(err, closeLocked(f))
		}
		if a != nil {
			return a, left, nil
		}
	}
	a, err := mapNew(f, want)
	if err != nil {
		return nil, nil, errors.Join(err, closeLocked(f))
	}
	return a, nil, nil
}

// mapNew makes a new arena in f.
func mapNew(f *os.File, h header) (*arena, error) {
	// The size goes to 0 first, so that all is zero, and the space is allocated
	// now: a tmpfs that is full later would kill the process by SIGBUS.
	_, size := arenaLayout(int(h.slots))
	if err := f.Truncate(0); err != nil {
		return nil, fmt.Errorf("cache: create arena: %w", err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return nil, errors.Join(fmt.Errorf("cache: allocate %d bytes for arena %q: %w", size, f.Name(), err), f.Truncate(0))
	}
	a, err := mapShared(f, int(h.slots))
	if err != nil {
		return nil, err
	}
	a.writeHeader(h)
	return a, nil
}

// mapLeft maps the arena that a predecessor left in f. It returns nil if there
// is none, or none worth keeping: one of another size without dirty tables.
func mapLeft(f *os.File, want header) (*arena, []entry, error) {
	h, err := readHeader(f, want)
	if h == nil {
		return nil, nil, err
	}
	a, err := mapShared(f, int(h.slots))
	if err != nil {
		return nil, nil, err
	}
	m := marks{arena: a}
	left, err := a.dirtyEntries()
	if err == nil {
		err = m.validate()
	}
	if err != nil {
		return nil, nil, errors.Join(&ArenaError{Path: f.Name(), Msg: err.Error()}, unix.Munmap(a.mem))
	}
	if len(left) == 0 && len(m.all()) == 0 && h.slots != want.slots {
		return nil, nil, unix.Munmap(a.mem)
	}
	return a, left, nil
}

// lockFile takes the lock on an arena. The kernel gives it up when the last
// thread of its holder is gone, so whoever has it is the only one.
func lockFile(f *os.File) error {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w: arena %q is locked by another process", ErrInUse, f.Name())
		}
		return fmt.Errorf("cache: lock arena %q: %w", f.Name(), err)
	}
	held, err := f.Stat()
	if err != nil {
		return fmt.Errorf("cache: open arena: %w", err)
	}
	named, err := os.Stat(f.Name())
	if err != nil || !os.SameFile(held, named) {
		return fmt.Errorf("%w: arena %q was replaced while it was opened", ErrInUse, f.Name())
	}
	return nil
}

// closeLocked closes f and gives up its lock, if it has it. Closing alone would
// leave the lock to a child of this process that was forked just now and has
// not yet closed its copy of the descriptor by exec.
func closeLocked(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}

// readHeader returns the header of the arena in f, nil if there is none: the
// file is empty, or its making was cut short.
func readHeader(f *os.File, want header) (*header, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("cache: open arena: %w", err)
	}
	if info.Size() == 0 {
		return nil, nil
	}
	var b [headerBytes]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("cache: read arena %q: %w", f.Name(), err)
	}
	if [8]byte(b[:8]) == [8]byte{} && info.Size() >= headerSize {
		return nil, nil
	}
	h, err := decodeHeader(b[:])
	if err == nil {
		err = h.validate(want, info.Size())
	}
	if err != nil {
		return nil, &ArenaError{Path: f.Name(), Msg: err.Error(), Layout: errors.Is(err, errLayout)}
	}
	return &h, nil
}

func mapShared(f *os.File, slots int) (*arena, error) {
	_, size := arenaLayout(slots)
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("cache: map arena %q: %w", f.Name(), err)
	}
	a := newArena(mem, slots)
	a.file = f
	return a, nil
}
