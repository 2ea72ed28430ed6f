package qcow2

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// A LockMode says which of QEMU's image locks an open file holds. They are
// advisory: QEMU's tools and this package respect them, cp does not.
type LockMode int

// The values of LockMode.
const (
	LockNone   LockMode = iota // no lock at all
	LockShared                 // reads, and tolerates writers: force-share, -U
	LockRead                   // reads, and refuses writers
	LockWrite                  // writes, and refuses other writers and readers of LockRead
)

// QEMU keeps a permission in use as a lock on byte lockUsed+i of the file, and
// a permission that others must not use as one on byte lockUnshared+i:
//
//	Bit  Permission       LockShared  LockRead  LockWrite
//	  0  consistent read  used        used      used
//	  1  write                        unshared  used, unshared
//	  2  write unchanged
//	  3  resize                       unshared  used, unshared
//
// All are shared locks of length 1 that belong to the open file description
// (F_OFD_SETLK), so that a descriptor open for reading can hold them. A
// conflict is found by asking whether an exclusive lock on the opposite byte
// could be had. Own locks come first: of two that open at once both may fail,
// never both succeed.
const (
	lockUsed     = 100
	lockUnshared = 200
)

// lockPermissions are QEMU's names of the bits.
var lockPermissions = [...]string{"consistent read", "write", "write unchanged", "resize"}

// bits returns the permissions that m uses and those it does not share.
func (m LockMode) bits() (used, unshared uint) {
	const read, write, resize = 1 << 0, 1 << 1, 1 << 3
	switch m {
	case LockShared:
		return read, 0
	case LockRead:
		return read, write | resize
	case LockWrite:
		return read | write | resize, write | resize
	}
	return 0, 0
}

// A LockError reports that another process uses a file in a way that excludes
// ours. It matches ErrLocked.
type LockError struct {
	Path       string
	Permission string // QEMU's name of it: "write", "resize", …
	Shared     bool   // the other uses what we cannot share; else it does not share what we need
}

func (e *LockError) Error() string {
	return fmt.Sprintf("%v: %q: %s; end the process that has it open, or read it with force-share (-U)",
		ErrLocked, e.Path, e.Lock())
}

// Lock says which lock could not be had, in QEMU's words.
func (e *LockError) Lock() string {
	shared := ""
	if e.Shared {
		shared = "shared "
	}
	return fmt.Sprintf("Failed to get %s%q lock", shared, e.Permission)
}

// Is reports whether target is ErrLocked.
func (e *LockError) Is(target error) bool { return target == ErrLocked }

// lockFile takes the locks of m on fd. When it fails, unlockFile drops those that
// it got.
func lockFile(fd int, path string, m LockMode) error {
	used, unshared := m.bits()
	for i := range lockPermissions {
		if used&(1<<i) != 0 {
			if err := lockByte(fd, path, lockUsed+int64(i)); err != nil {
				return err
			}
		}
		if unshared&(1<<i) != 0 {
			if err := lockByte(fd, path, lockUnshared+int64(i)); err != nil {
				return err
			}
		}
	}
	for i, name := range lockPermissions {
		if used&(1<<i) != 0 {
			if held, err := lockHeld(fd, path, lockUnshared+int64(i)); err != nil {
				return err
			} else if held {
				return &LockError{Path: path, Permission: name}
			}
		}
	}
	for i, name := range lockPermissions {
		if unshared&(1<<i) != 0 {
			if held, err := lockHeld(fd, path, lockUsed+int64(i)); err != nil {
				return err
			} else if held {
				return &LockError{Path: path, Permission: name, Shared: true}
			}
		}
	}
	return nil
}

// unlockFile drops all locks of fd. To close fd is not enough: a process that is
// just being started has a copy of each descriptor, and with it the locks, until
// it executes its program.
func unlockFile(fd int) {
	lk := unix.Flock_t{Type: unix.F_UNLCK} // to the end of the file, whatever its length
	_ = ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
}

// lockByte takes a shared lock on one byte.
func lockByte(fd int, path string, off int64) error {
	lk := unix.Flock_t{Type: unix.F_RDLCK, Start: off, Len: 1}
	err := ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk) })
	if err != nil {
		return fmt.Errorf("qcow2: lock byte %d of %q: %w", off, path, err)
	}
	return nil
}

// lockHeld reports whether another open file description has a lock on one byte.
func lockHeld(fd int, path string, off int64) (bool, error) {
	lk := unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: 1}
	err := ignoringEINTR(func() error { return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk) })
	if err != nil {
		return false, fmt.Errorf("qcow2: query lock byte %d of %q: %w", off, path, err)
	}
	return lk.Type != unix.F_UNLCK, nil
}
