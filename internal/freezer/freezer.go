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
// is then thawed as soon as the kernel has frozen it.
func Freeze(ctx context.Context, path string, device uint64, limit time.Duration) (*Frozen, error) {
	f, err := start(path, device, limit)
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
func start(path string, device uint64, limit time.Duration) (*Frozen, error) {
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
}

// thawLeft makes the call aside: it may wait for a device that its caller serves.
var thawLeft = aside.Op("thaw", func(l leftover, _ []*os.File) (struct{}, error) {
	f, err := openMount(l.Path, l.Device)
	if err != nil {
		return struct{}{}, err
	}
	defer f.Close()
	if err := fsfreeze(f, fiThaw); err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: it is not frozen
		return struct{}{}, fmt.Errorf("thaw %q: %w", l.Path, err)
	}
	return struct{}{}, nil
})

// ThawLeft thaws the filesystem that is mounted at path, which must be on the
// device, if it is frozen: a process that has ended may have left it so.
func ThawLeft(ctx context.Context, path string, device uint64) error {
	_, err := thawLeft(ctx, leftover{path, device})
	return err
}
