package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

const (
	unmountTime = time.Minute      // for the CSI calls of one volume
	stopTime    = time.Minute      // for the agent to end
	settleTime  = 10 * time.Second // for the kernel to finish what was ended
)

// strike takes s down: what is mounted, attached and running, in this order.
// It needs nothing but the kernel's word, so that it serves a run that ended
// well, one that was interrupted anywhere, and one that was kept. It returns
// nil if nothing had to be forced and nothing is left; the directory is then
// gone. agent is nil if it does not run.
func (s stage) strike(agent *agent) error {
	// Who interrupts a run does not interrupt its end: bounded, not cancelled.
	ctx := context.Background()
	var problems []error
	problem := func(err error) {
		if err != nil {
			problems = append(problems, err)
		}
	}
	problem(s.unmountQEMU())
	if agent != nil {
		problem(s.unmountVolumes(ctx))
		problem(agent.stop(stopTime))
	}
	if err := s.gone(); err != nil {
		problem(err)
		problem(s.force())
	}
	if left, err := s.leftovers(); err != nil || len(left) > 0 {
		problem(err)
		for _, l := range left {
			problem(fmt.Errorf("left behind: %s", l))
		}
		return errors.Join(problems...) // the directory is still in use
	}
	if len(problems) == 0 {
		problem(os.RemoveAll(string(s)))
	}
	return errors.Join(problems...)
}

// qemuMount is where the scenario mounts a file that QEMU's tools wrote.
func (s stage) qemuMount() string { return s.path("qemu", "mnt") }

func (s stage) unmountQEMU() error {
	err := unix.Unmount(s.qemuMount(), 0)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil // it is not mounted
	}
	return err
}

// unmountVolumes unpublishes and unstages every volume as kubelet would, the
// youngest mount first.
func (s stage) unmountVolumes(ctx context.Context) error {
	c, err := dial(s)
	if err != nil {
		return err
	}
	defer c.close()
	var problems []error
	for _, id := range s.mountedIDs() {
		ctx, cancel := context.WithTimeout(ctx, unmountTime)
		if err := c.unmount(ctx, id); err != nil {
			problems = append(problems, fmt.Errorf("volume %s: %w", id, err))
		}
		cancel()
	}
	return errors.Join(problems...)
}

// mountedIDs returns the IDs of volumes that a stage call was made for and
// not yet undone, in reverse order of their directories' creation.
func (s stage) mountedIDs() []string {
	entries, _ := os.ReadDir(s.path("staging"))
	made := map[string]time.Time{}
	var ids []string
	for _, e := range entries {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, s.path("pods", e.Name()), 0, unix.STATX_BTIME, &st); err == nil {
			made[e.Name()] = time.Unix(st.Btime.Sec, int64(st.Btime.Nsec))
		}
		ids = append(ids, e.Name())
	}
	slices.SortFunc(ids, func(a, b string) int { return made[b].Compare(made[a]) })
	return ids
}

// gone waits until nothing of s is left, and otherwise says what is.
func (s stage) gone() error {
	deadline := time.Now().Add(settleTime)
	for {
		left, err := s.leftovers()
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("had to be forced: %v", left)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// force removes what is left, and what comes up behind it, as a loop device
// does behind its mount.
func (s stage) force() error {
	var problems []error
	for range 4 {
		left, err := s.leftovers()
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		problems = problems[:0]
		for _, l := range left {
			if err := l.remove(); err != nil {
				problems = append(problems, fmt.Errorf("%s: %w", l, err))
			}
		}
		time.Sleep(100 * time.Millisecond) // the kernel detaches in its own time
	}
	return errors.Join(problems...)
}
