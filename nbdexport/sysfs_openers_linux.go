package nbdexport

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// openedElsewhere reports whether a process other than this one has the device node path open. It
// sees the processes of its PID namespace: run in the host's.
//
// The nbd driver has no such question to ask, unlike the loop driver, and fails the requests of
// whoever still reads and writes. Mounts and other exclusive holders are found by
// openExclusive; this finds the rest: a raw block volume in a container, udev, blkid.
func openedElsewhere(path string) (bool, error) {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		return false, err
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return false, err
	}
	self := os.Getpid()
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == self {
			continue
		}
		dir := filepath.Join("/proc", p.Name(), "fd")
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // the process has ended, or is one of the kernel's
		}
		for _, fd := range fds {
			// What is behind the link may be on a file system that does not answer (one of ours, say):
			// DONT_SYNC takes what the kernel knows.
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, filepath.Join(dir, fd.Name()), unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_TYPE, &st)
			if errors.Is(err, unix.ENOSYS) {
				return false, err
			}
			if err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Mkdev(st.Rdev_major, st.Rdev_minor) == want.Rdev {
				return true, nil
			}
		}
	}
	return false, nil
}
