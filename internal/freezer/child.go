package freezer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// childName is the name under which a program starts itself to be a freezer. Its
// arguments are the path, the device number and the limit in nanoseconds.
const childName = "csi-qcow2-freezer"

// What a freezer says, one line each; an error is any other line.
const (
	sayFrozen  = "frozen"
	sayBusy    = "busy" // somebody else has frozen it
	sayThawed  = "thawed"
	sayExpired = "expired" // it is not frozen, and has not been for all the time
)

// The requests of ioctl_fsfreeze: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	fiFreeze = 0xc0045877
	fiThaw   = 0xc0045878
)

// able says that this program's main calls Main: it can be its own freezer.
var able bool

// Main is the freezer for which this process was started, if it was, and says
// with which status the process shall end then. It is for the beginning of main.
func Main() (status int, child bool) {
	able = true
	if os.Args[0] != childName {
		return 0, false
	}
	// Whoever ends the parent means the parent: this process ends by itself. A
	// parent that has gone does not read what is said.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	if err := freeze(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Println(err)
		return 1, true
	}
	return 0, true
}

// freeze is the whole life of a freezer.
func freeze(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 3 {
		return fmt.Errorf("freezer: %d arguments, want 3", len(args))
	}
	device, err := strconv.ParseUint(args[1], 10, 64)
	if err != nil {
		return err
	}
	limit, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil {
		return err
	}
	say, err := hold(args[0], device, time.Duration(limit), in, out)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out, say)
	return err
}

// hold freezes, waits and thaws, and returns what there is to say then. It has
// let go of the filesystem, which may be unmounted.
func hold(path string, device uint64, limit time.Duration, in io.Reader, out io.Writer) (say string, err error) {
	f, err := openMount(path, device)
	if err != nil {
		return "", err
	}
	defer f.Close()
	switch err := fsfreeze(f, fiFreeze); {
	case errors.Is(err, unix.EBUSY):
		return sayBusy, nil
	case err != nil:
		return "", fmt.Errorf("FIFREEZE: %w", err)
	}
	fmt.Fprintln(out, sayFrozen) // the thaw follows whoever hears of it
	ended := make(chan struct{})
	go func() { // ends with this process at the latest
		_, _ = bufio.NewReader(in).ReadByte() // the word, or the end of the parent
		close(ended)
	}()
	expired := time.NewTimer(limit)
	defer expired.Stop()
	say = sayThawed
	select {
	case <-ended:
	case <-expired.C:
		say = sayExpired
	}
	if err := fsfreeze(f, fiThaw); errors.Is(err, unix.EINVAL) {
		return sayExpired, nil // somebody else has thawed it
	} else if err != nil {
		return "", fmt.Errorf("FITHAW: %w", err)
	}
	return say, nil
}

// openMount opens the directory path, which must be on the device.
func openMount(path string, device uint64) (*os.File, error) {
	f, err := os.OpenFile(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, err
	}
	if st.Dev != device {
		f.Close()
		return nil, fmt.Errorf("%q is on device %d:%d, not %d:%d", path,
			unix.Major(st.Dev), unix.Minor(st.Dev), unix.Major(device), unix.Minor(device))
	}
	return f, nil
}

func fsfreeze(f *os.File, request int) error {
	_, err := unix.IoctlRetInt(int(f.Fd()), uint(request))
	return err
}
