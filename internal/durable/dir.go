package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A Step is called before and after each change that a Dir makes, with a text
// such as "rename incoming/x volumes/x" or "after rename incoming/x volumes/x".
// An error stops the change (or what follows it) and is returned. It exists for
// tests that kill a process at every point.
type Step func(step string) error

// A Dir is an open directory. Names are relative to it, use slashes, and are
// resolved without leaving it and without following symbolic links.
type Dir struct {
	f    *os.File
	path string
	step Step
}

// The resolution rules of every path below a Dir.
const resolveBeneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// OpenDir opens the existing directory path. Symbolic links in path itself are
// followed: it is the operator's word, not a user's.
func OpenDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(abs, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &Dir{f: f, path: abs}, nil
}

// SetStep installs s; it is for tests and must be called before d is shared.
func (d *Dir) SetStep(s Step) { d.step = s }

// Path returns the absolute path that d was opened with.
func (d *Dir) Path() string { return d.path }

// Fd returns the descriptor of the directory, valid until Close.
func (d *Dir) Fd() int { return int(d.f.Fd()) }

// Close closes the descriptor.
func (d *Dir) Close() error { return d.f.Close() }

// OpenFile opens name with flag (O_CLOEXEC and O_NOFOLLOW are added) and mode.
// A file that it creates is durable only after its parent is synced: Publish
// and WriteFile do that, this does not.
func (d *Dir) OpenFile(name string, flag int, mode uint32) (*os.File, error) {
	fd, err := d.openat(name, flag, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(d.path, name)), nil
}

func (d *Dir) openat(name string, flag int, mode uint32) (int, error) {
	if !fs.ValidPath(name) {
		return -1, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	how := unix.OpenHow{
		Flags:   uint64(flag | unix.O_CLOEXEC | unix.O_NOFOLLOW),
		Mode:    uint64(mode),
		Resolve: resolveBeneath,
	}
	if flag&unix.O_CREAT == 0 {
		how.Mode = 0 // openat2 refuses a mode that it would not use
	}
	for {
		fd, err := unix.Openat2(d.Fd(), name, &how)
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		}
		return -1, &fs.PathError{Op: "open", Path: filepath.Join(d.path, name), Err: err}
	}
}

// withParent calls fn with a descriptor of the directory that holds name and
// with the last element of name.
func (d *Dir) withParent(name string, fn func(fd int, base string) error) error {
	if !fs.ValidPath(name) || name == "." {
		return &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	dir, base := path.Split(name)
	fd, err := d.openat(path.Clean("./"+dir), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := fn(fd, base); err != nil {
		return &fs.PathError{Op: "change", Path: filepath.Join(d.path, name), Err: err}
	}
	return nil
}

// change runs fn between two steps.
func (d *Dir) change(what string, fn func() error) error {
	if d.step == nil {
		return fn()
	}
	if err := d.step(what); err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	return d.step("after " + what)
}

// Mkdir creates the directory name, with mode 0700. An existing directory is
// success: a retry finds its own work.
func (d *Dir) Mkdir(name string) error {
	return d.change("mkdir "+name, func() error {
		return d.withParent(name, func(fd int, base string) error {
			if err := unix.Mkdirat(fd, base, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
				return err
			}
			return unix.Fsync(fd)
		})
	})
}

// Rename moves from to to, which must not exist, and syncs both parents.
func (d *Dir) Rename(from, to string) error {
	return d.change("rename "+from+" "+to, func() error { return d.rename(from, to, renameNoReplace) })
}

// Replace is Rename of a file to the name of another, which goes.
func (d *Dir) Replace(from, to string) error {
	return d.change("replace "+from+" "+to, func() error { return d.rename(from, to, unix.Renameat) })
}

func (d *Dir) rename(from, to string, by func(ffd int, from string, tfd int, to string) error) error {
	return d.withParent(from, func(ffd int, fbase string) error {
		return d.withParent(to, func(tfd int, tbase string) error {
			if err := by(ffd, fbase, tfd, tbase); err != nil {
				return err
			}
			// The new name first: losing the old one alone would lose the file.
			if err := unix.Fsync(tfd); err != nil {
				return err
			}
			return unix.Fsync(ffd)
		})
	})
}

// renameNoReplace renames without overwriting; file systems that lack the flag
// (NFS) get a plain rename, their callers hold the lock of both names.
func renameNoReplace(ffd int, from string, tfd int, to string) error {
	err := unix.Renameat2(ffd, from, tfd, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return unix.Renameat(ffd, from, tfd, to)
	}
	return err
}

// Remove removes the file name; its absence is success.
func (d *Dir) Remove(name string) error {
	return d.change("remove "+name, func() error {
		return d.withParent(name, func(fd int, base string) error {
			if err := unix.Unlinkat(fd, base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
			return unix.Fsync(fd)
		})
	})
}

// List returns the names in the directory name ("." is d itself) without
// temporary files, in directory order.
func (d *Dir) List(name string) ([]string, error) {
	f, err := d.OpenFile(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names := all[:0]
	for _, n := range all {
		if !isTemporary(n) {
			names = append(names, n)
		}
	}
	return names, nil
}

// Exists reports whether name exists, whatever it is.
func (d *Dir) Exists(name string) (bool, error) {
	fd, err := d.openat(name, unix.O_PATH, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, unix.Close(fd)
}

// RemoveTemporary removes the temporary files that a crash left in the
// directory name. Nothing may write there at the same time.
func (d *Dir) RemoveTemporary(name string) error {
	f, err := d.OpenFile(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, n := range names {
		if isTemporary(n) {
			if err := d.Remove(path.Join(name, n)); err != nil && !isBusyOnNFS(n, err) {
				return err
			}
		}
	}
	return nil
}

func temporary(base string) string { return "." + base + ".tmp" }

func isTemporary(base string) bool {
	return strings.HasPrefix(base, ".") && strings.HasSuffix(base, ".tmp") || strings.HasPrefix(base, nfsPrefix)
}

// Sync makes the entries of the directory name durable.
func (d *Dir) Sync(name string) error {
	fd, err := d.openat(name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fsync(fd); err != nil {
		return fmt.Errorf("sync %q: %w", filepath.Join(d.path, name), err)
	}
	return nil
}
