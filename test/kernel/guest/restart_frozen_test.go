//go:build kernelguest

package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// freezerName is how a process that freezes a filesystem for a snapshot calls itself.
const freezerName = "csi-qcow2-freezer"

// A freezerProcess freezes a filesystem for a snapshot.
type freezerProcess int

// findFreezer returns the freezer that is at work.
func findFreezer() (freezerProcess, bool) {
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		if b, err := os.ReadFile(path); err == nil && bytes.HasPrefix(b, []byte(freezerName+"\x00")) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
				return freezerProcess(pid), true
			}
		}
	}
	return 0, false
}

func (f freezerProcess) signal(sig syscall.Signal) { syscall.Kill(int(f), sig) }

// state is how ps calls the state of its first thread, "" when it is gone.
func (f freezerProcess) state() string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", f))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return rest[:1]
}

// waitsForDisk reports whether one of its threads does.
func (f freezerProcess) waitsForDisk() bool {
	stats, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", f))
	for _, path := range stats {
		if b, err := os.ReadFile(path); err == nil && strings.Contains(string(b), ") D ") {
			return true
		}
	}
	return false
}

// A frozen test has a filesystem that is frozen for snapshots, and another one that tells that time passes.
type frozenTest struct {
	*agent
	v            *volume
	pulse, clock *pulse
	snapshots    int
}

// snapshot begins one, and returns how to see it to its end and the process that freezes for it.
func (f *frozenTest) snapshot() (finish func(), at freezerProcess) {
	f.t.Helper()
	f.snapshots++
	name := fmt.Sprintf("%s-%d", f.v.name, f.snapshots)
	done := make(chan error, 1)
	go func() { // ends when the call has succeeded
		done <- f.try("CreateSnapshot", func(ctx context.Context) error {
			_, err := f.v.snapshotOnce(ctx, name)
			return err
		})
	}()
	finish = func() {
		f.t.Helper()
		if err := <-done; err != nil {
			f.t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if at, found := findFreezer(); found {
			return finish, at
		}
		if time.Now().After(deadline) {
			f.t.Fatal("no process freezes the filesystem")
		}
	}
}

// hold begins a snapshot and stops the process that freezes for it while the filesystem is frozen.
func (f *frozenTest) hold() (finish func(), at freezerProcess) {
	f.t.Helper()
	for {
		finish, at := f.snapshot()
		for at.state() != "" && at.state() != "Z" {
			at.signal(syscall.SIGSTOP)
			wait(f.t, "the freezer to stop", func() bool { return at.state() != "S" && at.state() != "R" && at.state() != "D" })
			if at.state() == "T" && f.still() {
				return finish, at
			}
			at.signal(syscall.SIGCONT)
			time.Sleep(time.Millisecond) // it goes on a little
		}
		finish() // it was too fast
	}
}

// strikeFreezing begins a snapshot and kills the process before its filesystem is frozen, and then the process that
// freezes it, inside the kernel: that waits for writers, and these for a device that nobody serves. When somebody
// does the kernel goes on, for a process that has been killed.
func (f *frozenTest) strikeFreezing() (finish func()) {
	f.t.Helper()
	for {
		finish, at := f.snapshot()
		at.signal(syscall.SIGSTOP)
		f.kill()
		at.signal(syscall.SIGCONT)
		gone := func() bool { return at.state() == "" || at.state() == "Z" }
		wait(f.t, "the freezer to wait for the device", func() bool { return gone() || at.waitsForDisk() })
		if !gone() {
			at.signal(syscall.SIGKILL)
			return finish
		}
		f.start() // it was too fast
		finish()
	}
}

// still reports whether nothing can be written to v while the other filesystem takes many writes.
func (f *frozenTest) still() bool {
	const beats = 12
	pulse, clock := f.pulse.beats.Load(), f.clock.beats.Load()
	wait(f.t, "writes to the other filesystem", func() bool {
		return f.clock.beats.Load() > clock+beats || f.pulse.beats.Load() > pulse+1
	})
	return f.pulse.beats.Load() <= pulse+1 // one may have been under way
}

// direct writes to v past the page cache: one write is under way most of the time.
func (w *workers) direct(v *volume) {
	w.start("direct writes to "+v.name, func(ctx context.Context) error {
		f, err := os.OpenFile(filepath.Join(v.target(), "direct"), os.O_CREATE|os.O_WRONLY|syscall.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		page := alignedPage()
		for n := int64(0); ctx.Err() == nil; n++ {
			if _, err := f.WriteAt(page, n%256*4096); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestRestartFrozen kills the process while it has a filesystem frozen for a snapshot, alone and together with
// the process that would thaw it. It is thawed, whatever was killed, and the snapshot is taken after all.
func TestRestartFrozen(t *testing.T) {
	a := newAgent(t)
	clock := a.create("clock", "ext4", 32<<20, "")
	clock.mount()
	ticking := &workers{t: t}
	defer ticking.stop()
	tick := ticking.pulse(clock)
	for _, fstype := range []string{"ext4", "xfs"} {
		v := a.create("frozen-"+fstype, fstype, 320<<20, "")
		v.mount()
		w := &workers{t: t}
		defer w.stop()
		f := &frozenTest{agent: a, v: v, pulse: w.pulse(v), clock: tick}
		w.direct(v)
		f.pulse.beaten(a)
		thawed := func(what string, finish func()) {
			t.Helper()
			begin := time.Now()
			a.start()
			f.pulse.beaten(a)
			t.Logf("%s, %s: writes go on %d ms after the start of the next process", fstype, what, time.Since(begin).Milliseconds())
			finish()
			wait(t, "the records to go", func() bool {
				left, _ := os.ReadDir(filepath.Join(runDir, "frozen"))
				return len(left) == 0
			})
			f.pulse.beaten(a)
		}

		if fstype == "ext4" {
			finish, freezer := f.hold()
			a.kill()
			freezer.signal(syscall.SIGCONT)
			thawed("the process killed", finish)

			finish, freezer = f.hold()
			a.kill()
			freezer.signal(syscall.SIGKILL)
			thawed("both killed while it was frozen", finish)
		}
		thawed("both killed while it was being frozen", f.strikeFreezing())
		w.stop()
		v.unmount()
	}
	ticking.stop()
	clock.unmount()
}
