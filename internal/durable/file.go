package durable

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxFileBytes bounds what ReadFile reads: a record is small, a larger file is
// damage or malice.
const maxFileBytes = 1 << 20

// WriteFile replaces the content of name, or creates it with mode 0600. A crash
// leaves the old content or the new.
func (d *Dir) WriteFile(name string, content []byte) error {
	return d.change("write "+name, func() error {
		return d.withParent(name, func(fd int, base string) error {
			tmp := temporary(base)
			if err := writeSynced(fd, tmp, content); err != nil {
				return err
			}
			if err := unix.Renameat(fd, tmp, fd, base); err != nil {
				return err
			}
			return unix.Fsync(fd)
		})
	})
}

func writeSynced(dirfd int, name string, content []byte) error {
	fd, err := unix.Openat(dirfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Sync()
}

// ReadFile returns the content of the regular file name, at most 1 MiB.
func (d *Dir) ReadFile(name string) ([]byte, error) {
	f, err := d.OpenFile(name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFileBytes {
		return nil, &fs.PathError{Op: "read", Path: filepath.Join(d.path, name),
			Err: fmt.Errorf("not a regular file of at most %d bytes", maxFileBytes)}
	}
	return io.ReadAll(io.LimitReader(f, maxFileBytes))
}

// Publish gives the new file from, complete and synced by its writer, the name
// to in one step.
func (d *Dir) Publish(from, to string) error {
	return d.Rename(path.Clean(from), path.Clean(to))
}
