package cache

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mapFile returns a new arena in the file at path, which is created if need
// be and locked until unmap. Its space is allocated now: a tmpfs that is full
// later would kill the process with SIGBUS.
func mapFile(path string, slots int) (*arena, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cache: open arena: %w", err)
	}
	a, err := mapOpen(f, slots)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return a, nil
}

func mapOpen(f *os.File, slots int) (*arena, error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%w: arena %q is locked by another process", ErrInUse, f.Name())
	}
	_, size := arenaLayout(slots)
	if err := f.Truncate(0); err != nil {
		return nil, fmt.Errorf("cache: create arena: %w", err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return nil, fmt.Errorf("cache: allocate %d bytes for arena %q: %w", size, f.Name(), err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("cache: map arena %q: %w", f.Name(), err)
	}
	a := newArena(mem, slots)
	a.file = f
	return a, nil
}
