package driver

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// A testRoom is a pool's room. Looks are what the test sends.
type testRoom struct {
	full  atomic.Bool
	looks chan struct{}
}

func (r *testRoom) Pause() time.Duration { return time.Hour }

func (r *testRoom) AwaitRoom(ctx context.Context) error {
	select {
	case <-r.looks:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *testRoom) Refuse() {}

func (r *testRoom) admit(int64) error {
	if r.full.Load() {
		return syscall.ENOSPC
	}
	return nil
}

func newTestPausing(t *testing.T) (*pausing, *testRoom) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	create, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(qcow2.Create(t.Context(), create, 16<<20, qcow2.CreateOptions{}), create.Close()); err != nil {
		t.Fatal(err)
	}
	file, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	room := &testRoom{looks: make(chan struct{})}
	im, err := qcow2.Open(t.Context(), file, qcow2.Options{Admit: room.admit, PassDiscard: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	p := newPausing(imagebackend.New(im, imagebackend.Options{}), room)
	t.Cleanup(p.giveUp)
	return p, room
}

func TestPausingConforms(t *testing.T) {
	nbdtest.TestBackend(t, func(t *testing.T) nbdexport.Backend {
		p, _ := newTestPausing(t)
		return p
	})
}

// TestPause: a write that finds no space waits over as many looks as it takes,
// other requests go on meanwhile, and then it is there.
func TestPause(t *testing.T) {
	p, room := newTestPausing(t)
	data := bytes.Repeat([]byte{7}, 1<<20)
	if _, err := p.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	room.full.Store(true)
	done := make(chan error, 1)
	go func() { // ends with giveUp at the latest
		_, err := p.WriteAt(data, 8<<20)
		done <- err
	}()
	for range 3 { // looks that find room for others only
		room.looks <- struct{}{}
	}
	if n := p.paused(); n != 1 {
		t.Errorf("%d writes wait, want 1", n)
	}
	got := make([]byte, len(data))
	if _, err := p.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read: %v", err)
	}
	if _, err := p.WriteAt(data, 0); err != nil {
		t.Errorf("write in place: %v", err)
	}
	if err := p.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	room.full.Store(false)
	room.looks <- struct{}{}
	if err := <-done; err != nil {
		t.Fatalf("with room again: %v", err)
	}
	if _, err := p.ReadAt(got, 8<<20); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read what waited: %v", err)
	}
	if n := p.paused(); n != 0 {
		t.Errorf("%d writes wait, want none", n)
	}
}

// TestPauseEnds: what waits gets ENOSPC when the volume is unstaged, and when it has
// waited for long enough. When the process stops it is left to the next one, if the
// device survives that.
func TestPauseEnds(t *testing.T) {
	for _, c := range []struct {
		name   string
		pause  time.Duration
		unheld error
		end    func(r *rig, id string)
		want   error
	}{
		{"unstaged", time.Hour, nil, func(r *rig, id string) {
			if err := r.unstage(id); err != nil {
				r.t.Error(err)
			}
		}, syscall.ENOSPC},
		{"stopped", time.Hour, nil, func(r *rig, _ string) { r.replace() }, nbdexport.ErrUnanswered},
		{"stopped without a holder", time.Hour, errors.New("no holder"), func(r *rig, _ string) { r.replace() }, syscall.ENOSPC},
		{"long enough", 10 * time.Millisecond, nil, func(*rig, string) {}, syscall.ENOSPC},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newGuardedRig(t, volume.Guard{StopAt: 1e-9, Pause: c.pause})
			r.kernel.unheld = c.unheld
			id := r.volume("v", nil)
			if err := r.stage(id, blockCap()); err != nil {
				t.Fatal(err)
			}
			backend, pool := r.kernel.devices[r.driver.stagedVolume(id).device.Path()].backend, r.pool
			done := make(chan error, 1)
			go func() { // ends with the pause
				_, err := backend.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
				done <- err
			}()
			if c.pause == time.Hour {
				r.awaitReason(id, reasonWritesPaused)
			}
			c.end(r, id)
			if err := <-done; !errors.Is(err, c.want) {
				t.Errorf("the write that waited: %v, want %v", err, c.want)
			}
			if got := pool.Refused() > 0; got != errors.Is(c.want, syscall.ENOSPC) {
				t.Errorf("counted as refused: %v", got)
			}
		})
	}
}

// TestPauseAfterFailedUnstage: writes of who keeps a volume from being unstaged wait
// for space as before.
func TestPauseAfterFailedUnstage(t *testing.T) {
	r := newGuardedRig(t, volume.Guard{StopAt: 1e-9, Pause: time.Hour})
	id := r.volume("v", nil)
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	device := r.kernel.devices[r.driver.stagedVolume(id).device.Path()]
	hold := func(held bool) {
		r.kernel.mu.Lock()
		defer r.kernel.mu.Unlock()
		device.held = held
	}
	hold(true)
	wantCode(t, "unstage of a device that is held", r.unstage(id), codes.Aborted)
	done := make(chan error, 1)
	go func() { // ends with the unstage at the latest
		_, err := device.backend.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
		done <- err
	}()
	r.awaitReason(id, reasonWritesPaused)
	hold(false)
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("the write that waited: %v, want ENOSPC", err)
	}
}

// awaitReason waits until something is wrong with the volume id for this reason.
func (r *rig) awaitReason(id, reason string) {
	r.t.Helper()
	for deadline := time.Now().Add(time.Minute); !slices.Contains(r.reasons(id), reason); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("the health is %q, want %s", r.reasons(id), reason)
		}
	}
}
