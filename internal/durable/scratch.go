package durable

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// OpenScratch opens an empty file in the directory name for reading and writing. It
// has no name of its own and is gone when it is closed; on NFS, which knows no such
// files, it has one that RemoveTemporary removes after a crash.
func (d *Dir) OpenScratch(name string) (*os.File, error) {
	f, err := d.OpenFile(name, unix.O_TMPFILE|unix.O_RDWR, 0o600)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return f, err
	}
	tmp := path.Join(name, temporary(fmt.Sprintf("scratch-%x", rand.Uint64())))
	f, err = d.OpenFile(tmp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	err = d.withParent(tmp, func(fd int, base string) error { return unix.Unlinkat(fd, base, 0) })
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
