package driver

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"csi-qcow2/internal/freezer"
)

// snapshot takes a snapshot with the parameter freeze, if it is not "".
func (r *rig) snapshot(name, id, freeze string) error {
	q := &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id, Parameters: map[string]string{foreignPrefix + "x": "y"}}
	if freeze != "" {
		q.Parameters["freeze"] = freeze
	}
	_, err := r.CreateSnapshot(r.t.Context(), q)
	return err
}

// wantFreezes checks how often the staging path was frozen since the last call,
// and that it is not any more.
func (r *rig) wantFreezes(want int) {
	r.t.Helper()
	r.wantThawed()
	r.kernel.mu.Lock()
	defer r.kernel.mu.Unlock()
	if len(r.kernel.freezes) != want {
		r.t.Errorf("freezes: got %q, want %d", r.kernel.freezes, want)
	}
	r.kernel.freezes = nil
}

// wantThawed waits until nothing is frozen and no record says so.
func (r *rig) wantThawed() {
	r.t.Helper()
	for end := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Millisecond) {
		records, err := os.ReadDir(r.path("run/frozen"))
		if err != nil && !os.IsNotExist(err) {
			r.t.Fatal(err)
		}
		r.kernel.mu.Lock()
		frozen := len(r.kernel.frozen)
		r.kernel.mu.Unlock()
		if frozen == 0 && len(records) == 0 {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("frozen: %d, records: %v", frozen, records)
		}
	}
}

func TestSnapshotFreezes(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	wantCode(t, "not staged", r.snapshot("s0", id, ""), codes.OK)
	r.wantFreezes(0)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "default", r.snapshot("s1", id, ""), codes.OK)
	r.wantFreezes(1)
	wantCode(t, "again", r.snapshot("s1", id, ""), codes.OK)
	r.wantFreezes(0)
	wantCode(t, "true", r.snapshot("s2", id, "true"), codes.OK)
	r.wantFreezes(1)
	wantCode(t, "false", r.snapshot("s3", id, "false"), codes.OK)
	r.wantFreezes(0)
	for _, value := range []string{"yes", "TRUE", " true", "1"} {
		wantCode(t, value, r.snapshot("s4", id, value), codes.InvalidArgument)
	}
	_, err := r.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s4", SourceVolumeId: id, Parameters: map[string]string{"Freeze": "true"}})
	wantCode(t, "another case", err, codes.InvalidArgument)
	r.volume("clone", fromVolume(id))
	r.wantFreezes(1)
	if err := r.unstage(id); err != nil {
		t.Fatal(err)
	}
	if err := r.stage(id, blockCap()); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "block", r.snapshot("s5", id, ""), codes.OK)
	r.wantFreezes(0)
}

func TestSnapshotThatCannotFreeze(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name         string
		freeze, thaw error
		want         codes.Code
	}{
		{"somebody else has frozen it", freezer.ErrFrozen, nil, codes.OK},
		{"the kernel refuses", unix.EOPNOTSUPP, nil, codes.FailedPrecondition},
		{"thawed too early", nil, freezer.ErrExpired, codes.Unavailable},
		{"cannot be thawed", nil, unix.EIO, codes.Unavailable},
	} {
		r.kernel.freezeErr, r.kernel.thawErr = c.freeze, c.thaw
		err := r.snapshot(c.name, id, "")
		wantCode(t, c.name, err, c.want)
		if c.want == codes.FailedPrecondition && !strings.Contains(err.Error(), "freeze") {
			t.Errorf("%s: %v does not name the parameter", c.name, err)
		}
		r.wantThawed()
		resp, err := r.ListSnapshots(t.Context(), &csi.ListSnapshotsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := len(resp.GetEntries()), 1; got != want { // the first
			t.Errorf("%s: %d snapshots, want %d", c.name, got, want)
		}
	}
	r.kernel.freezeErr, r.kernel.thawErr = nil, nil
	unlock, _ := r.driver.locks.try(id)
	wantCode(t, "another call changes the volume", r.snapshot("busy", id, ""), codes.Aborted)
	unlock()
	wantCode(t, "then", r.snapshot("busy", id, ""), codes.OK)
}

// The filesystem that the pool is on is not frozen: the snapshot would wait for itself.
func TestPoolIsNotFrozen(t *testing.T) {
	r := newRig(t)
	var st unix.Stat_t
	if err := unix.Stat(r.path("pool"), &st); err != nil {
		t.Fatal(err)
	}
	r.kernel.next = st.Dev - 1
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "snapshot", r.snapshot("s", id, ""), codes.OK)
	r.wantFreezes(0)
}

// A snapshot is killed at each step, its freezer too: the next process thaws.
func TestKilledWhileFrozen(t *testing.T) {
	frozen := 0
	for n := 0; ; n++ {
		r := newRig(t)
		id := r.volume("v", nil)
		if err := r.stage(id, mountCap("")); err != nil {
			t.Fatal(err)
		}
		r.kernel.arm(n)
		err := r.snapshot("s", id, "")
		if !r.kernel.died() {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		r.kernel.mu.Lock()
		frozen += len(r.kernel.frozen)
		r.kernel.mu.Unlock()
		r.restart()
		r.wantThawed()
		wantCode(t, fmt.Sprintf("kill %d: again", n), r.snapshot("s", id, ""), codes.OK)
		if t.Failed() {
			return
		}
	}
	if frozen == 0 {
		t.Error("no kill came while the filesystem was frozen")
	}
}

// TestThawIsTriedAgain: when the background could not thaw within its time, as
// while writes wait for space, the next snapshot lets it try again.
func TestThawIsTriedAgain(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	if err := r.stage(id, mountCap("")); err != nil {
		t.Fatal(err)
	}
	r.kernel.thawErr, r.kernel.leftErr = unix.EIO, unix.ETIMEDOUT
	wantCode(t, "cannot be thawed", r.snapshot("s", id, ""), codes.Unavailable)
	r.driver.work.Wait()
	wantCode(t, "cannot be thawed yet", r.snapshot("s", id, ""), codes.Unavailable)
	r.driver.work.Wait()
	r.kernel.thawErr, r.kernel.leftErr = nil, nil
	wantCode(t, "is being thawed", r.snapshot("s", id, ""), codes.Unavailable)
	r.wantThawed()
	r.driver.work.Wait()
	wantCode(t, "thawed", r.snapshot("s", id, ""), codes.OK)
}
