package freezer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/aside"
)

// Errors that a caller can act on. Compare with errors.Is.
var (
	// ErrFrozen: somebody else has frozen the filesystem.
	ErrFrozen = errors.New("freezer: the filesystem is frozen already")
	// ErrExpired: the filesystem was thawed before it was to be.
	ErrExpired = errors.New("freezer: the filesystem was thawed before its time")
)

// A Frozen is a filesystem that is being kept frozen.
type Frozen struct {
	orders io.WriteCloser
	lines  <-chan string // what the freezer says; closed when it has ended
}

// Freeze freezes the filesystem that is mounted at path, which must be on the
// device, for at most limit. It returns early when ctx ends: the filesystem
// is then thawed as soon as the kernel has frozen it. The file lock stays locked
// until the freezer is gone, for ThawLeft; "" is for none.
func Freeze(ctx context.Context, path string, device uint64, limit time.Duration, lock string) (*Frozen, error) {
	f, err := start(path, device, limit, lock)
	if err != nil {
		return nil, err
	}
	line, err := f.next(ctx)
	switch {
	case err == nil && line == sayFrozen:
		return f, nil
	case err == nil && line == sayBusy:
		err = ErrFrozen
	case err == nil:
		err = fmt.Errorf("freezer: %s", line)
	}
	return nil, errors.Join(fmt.Errorf("freeze %q: %w", path, err), f.orders.Close())
}

// start starts a freezer.
func start(path string, device uint64, limit time.Duration, lock string) (*Frozen, error) {
	if !able {
		return nil, errors.New("freezer: this program does not call Main")
	}
	cmd := &exec.Cmd{
		Path:        "/proc/self/exe", // the program that runs, even when another has its name by now
		Args:        []string{childName, path, strconv.FormatUint(device, 10), strconv.FormatInt(int64(limit), 10)},
		Env:         []string{"GOMAXPROCS=1"},
		Dir:         "/",
		SysProcAttr: &syscall.SysProcAttr{Setsid: true}, // what a terminal sends is for the parent
	}
	if lock != "" {
		held, err := os.Open(lock)
		if err != nil {
			return nil, err
		}
		defer held.Close() // the freezer has a copy, and with it the lock
		if err := unix.Flock(int(held.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return nil, fmt.Errorf("lock %q: %w", lock, err)
		}
		cmd.ExtraFiles = []*os.File{held}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := make(chan string, 2) // all that it ever says
	go func() {                   // ends with the freezer
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan() && len(lines) < cap(lines); {
			lines <- s.Text()
		}
		_ = cmd.Wait() // it has said what is wrong
	}()
	return &Frozen{in, lines}, nil
}

// next returns what the freezer says next.
func (f *Frozen) next(ctx context.Context) (string, error) {
	select {
	case line, ok := <-f.lines:
		if !ok {
			return "", errors.New("freezer: it ended without a word")
		}
		return line, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// Thaw thaws the filesystem. ErrExpired says that it was not frozen any more.
// When ctx ends first, it is thawed later, without anybody's help.
func (f *Frozen) Thaw(ctx context.Context) error {
	// Closing says the same as a word, and reaches a freezer that has expired, too.
	closeErr := f.orders.Close()
	line, err := f.next(ctx)
	switch {
	case err != nil:
	case line == sayThawed:
		return nil
	case line == sayExpired:
		err = ErrExpired
	default:
		err = errors.New("freezer: " + strings.TrimSpace(line))
	}
	return errors.Join(fmt.Errorf("thaw: %w", err), closeErr)
}

// A leftover is what ThawLeft is about.
type leftover struct {
	Path   string
	Device uint64
	Lock   string
}

// thawLeft makes the calls aside: they may wait for a device that their caller serves.
var thawLeft = aside.Op("thaw", func(l leftover, _ []*os.File) (struct{}, error) {
	if err := l.thaw(); err != nil || l.Lock == "" {
		return struct{}{}, err
	}
	f, err := os.Open(l.Lock)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		return struct{}{}, fmt.Errorf("lock %q: %w", l.Lock, err)
	}
	return struct{}{}, l.thaw()
})

// thaw thaws what is frozen now. The kernel says the same of what is being frozen as of what is not frozen.
func (l leftover) thaw() error {
	f, err := openMount(l.Path, l.Device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fsfreeze(f, fiThaw); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("thaw %q: %w", l.Path, err)
	}
	return nil
}

// ThawLeft thaws the filesystem that is mounted at path, which must be on the
// device, if it is frozen: a process that has ended may have left it so. With the
// lock that Freeze was given, it waits for the freezer to be gone, and thaws then
// what that one has frozen at last.
func ThawLeft(ctx context.Context, path string, device uint64, lock string) error {
	_, err := thawLeft(ctx, leftover{path, device, lock})
	return err
}
