package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

// imgText puts err into qemu-img's words, where it has some.
func imgText(err error) string {
	var (
		backing *imagefile.BackingError
		format  *imagefile.FormatError
		name    *imagefile.NameError
		lock    *qcow2.LockError
		path    *fs.PathError
	)
	switch {
	case errors.As(err, &backing):
		return "Could not open backing file: " + imgText(backing.Err)
	case errors.As(err, &format) && !format.Probed:
		return fmt.Sprintf("Unknown driver '%s'", format.Format)
	case errors.As(err, &name) && name.Protocol != "":
		return fmt.Sprintf("Unknown protocol '%s'", name.Protocol)
	case errors.As(err, &lock):
		return fmt.Sprintf("%s\nIs another process using the image [%s]?", lock.Lock(), lock.Path)
	case errors.Is(err, qcow2.ErrNotQcow2):
		return "Image is not in qcow2 format"
	case errors.As(err, &path):
		if errors.Is(path, syscall.EISDIR) {
			return fmt.Sprintf("'file' driver requires '%s' to be a regular file", path.Path)
		}
		if path.Op == "open" {
			return fmt.Sprintf("Could not open '%s': %s", path.Path, errnoText(path.Err))
		}
	}
	return errnoText(err)
}

// errnoText returns the C library's words for the errno of err, if that is all
// that err has, else its own.
func errnoText(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	if text, ok := errnoTexts[errno]; ok {
		return text
	}
	return errno.Error()
}

// errnoTexts are the errors that users of a tool for images see, as strerror(3) spells them.
var errnoTexts = map[syscall.Errno]string{
	syscall.ENOENT:     "No such file or directory",
	syscall.EACCES:     "Permission denied",
	syscall.EPERM:      "Operation not permitted",
	syscall.EIO:        "Input/output error",
	syscall.ENOSPC:     "No space left on device",
	syscall.EROFS:      "Read-only file system",
	syscall.EINVAL:     "Invalid argument",
	syscall.ENOTDIR:    "Not a directory",
	syscall.EISDIR:     "Is a directory",
	syscall.EFBIG:      "File too large",
	syscall.ELOOP:      "Too many levels of symbolic links",
	syscall.EEXIST:     "File exists",
	syscall.EDQUOT:     "Disk quota exceeded",
	syscall.EMFILE:     "Too many open files",
	syscall.ETXTBSY:    "Text file busy",
	syscall.ENXIO:      "No such device or address",
	syscall.EBUSY:      "Device or resource busy",
	syscall.EOPNOTSUPP: "Operation not supported",
}

// statBlocks returns the 512-byte blocks that a file takes.
func statBlocks(st os.FileInfo) int64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks
	}
	return (st.Size() + 511) / 512
}
