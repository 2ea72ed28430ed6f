package durable

import (
	"errors"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// RemoveAll removes name and everything below it; its absence is success. A
// crash may leave a part of it. A file that is open on NFS keeps its directories,
// which can be used again or removed later.
func (d *Dir) RemoveAll(name string) error {
	return d.change("remove-all "+name, func() error {
		return d.withParent(name, func(fd int, base string) error {
			if _, err := removeAll(fd, base); err != nil {
				return err
			}
			return unix.Fsync(fd)
		})
	})
}

// removeAll removes base and what is below it. kept says that a part of it stays
// until a file there, which is open on NFS, is closed.
func removeAll(dirfd int, base string) (kept bool, err error) {
	err = unix.Unlinkat(dirfd, base, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if isBusyOnNFS(base, err) {
		return true, nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return false, err
	}
	fd, err := unix.Openat(dirfd, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return false, err
	}
	for _, name := range names {
		k, err := removeAll(fd, name)
		if err != nil {
			return false, err
		}
		kept = kept || k
	}
	err = unix.Unlinkat(dirfd, base, unix.AT_REMOVEDIR)
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.ENOTEMPTY) && (kept || hasNFSName(f)):
		return true, nil
	}
	return false, err
}

// nfsPrefix begins the name that an NFS client gives a file that is removed, or
// replaced, while a process of the same machine has it open. The client removes it
// with the last close; until then that is EBUSY. A crash leaves it for ever.
const nfsPrefix = ".nfs"

func isBusyOnNFS(base string, err error) bool {
	return strings.HasPrefix(base, nfsPrefix) && errors.Is(err, unix.EBUSY)
}

// hasNFSName reports whether the directory f has, by now, the name of a file that is
// open on NFS.
func hasNFSName(f *os.File) bool {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false
	}
	names, _ := f.Readdirnames(-1) // what could be read counts
	return slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, nfsPrefix) })
}
