package sanity

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestKilledWithVolumesStaged kills the process under two mounted filesystems and a raw
// device. The next one reports them, hangs nowhere, and repairs them when they are staged again.
func TestKilledWithVolumesStaged(t *testing.T) {
	p := newProcess(t)
	p.alone = true
	p.start()
	k := newKubelet(p)
	content := bytes.Repeat([]byte("qcow2"), 100000)
	fstypes := map[string]string{"ext4": "ext4", "xfs": "xfs", "block": "", "gone": "ext4"}
	ids := make(map[string]string)
	for name, fstype := range fstypes {
		ids[name] = k.useNew(name, fstype)
		if fstype != "" {
			writeFile(t, k.target(name)+"/f", content)
		} else {
			writeDevice(t, k.target(name), content[:4096*100])
		}
	}
	if err := p.signal(syscall.SIGKILL); err == nil {
		t.Fatal("the process ended well after SIGKILL")
	}
	p.start()

	for name, id := range ids {
		p.wait("the decision about "+name, func() bool {
			h := k.health(id)
			return len(h) != 1 || !strings.Contains(h[0], "DeviceReturning")
		})
		health, err := k.NodeGetVolumeHealth(k.rpc(), &csi.NodeGetVolumeHealthRequest{VolumeId: id})
		if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) != 1 ||
			health.GetVolumeHealth().GetHealthStatuses()[0].GetStatus() != csi.VolumeHealthErrorType_INACCESSIBLE {
			t.Errorf("%s: health %v, %v; want INACCESSIBLE", name, health, err)
		}
		_, err = k.NodeGetVolumeStats(k.rpc(), &csi.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: k.target(name)})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("%s: stats: %v, want UNAVAILABLE", name, err)
		}
		if err := k.publish(name, id, fstypes[name]); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: publish: %v, want FAILED_PRECONDITION", name, err)
		}
		if _, err := k.DeleteVolume(k.rpc(), &csi.DeleteVolumeRequest{VolumeId: id}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: delete: %v, want FAILED_PRECONDITION", name, err)
		}
	}
	list, err := k.ControllerListVolumeHealth(k.rpc(), &csi.ControllerListVolumeHealthRequest{})
	if err != nil || len(list.GetEntries()) != len(ids) {
		t.Errorf("list of health: %d entries, %v; want %d", len(list.GetEntries()), err, len(ids))
	}

	k.unuse("gone", ids["gone"]) // one is given up, the others are staged again
	k.deleteVolume(ids["gone"])
	delete(ids, "gone")
	for name, id := range ids {
		k.use(name, id, fstypes[name])
		k.use(name, id, fstypes[name])
		if fstypes[name] != "" {
			wantFile(t, k.target(name)+"/f", content)
			writeFile(t, k.target(name)+"/g", content)
		} else {
			wantDevice(t, k.target(name), content[:4096*100])
		}
		if h := k.health(id); len(h) != 1 || !strings.HasPrefix(h[0], "DEGRADED DeviceUnheld ") {
			t.Errorf("%s: health after the repair: %q; want that there is no holder", name, h)
		}
	}
	if got := len(p.loops()); got != len(ids) {
		t.Errorf("%d loop devices for %d volumes: %q", got, len(ids), p.loops())
	}
	for name, id := range ids {
		k.dispose(name, id)
	}
	k.finish()
}

// TestStoppedWithVolumesStaged: SIGTERM flushes; the next process repairs.
func TestStoppedWithVolumesStaged(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("v", "ext4")
	writeFile(t, k.target("v")+"/f", []byte("hello"))
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Fatalf("SIGTERM with a staged volume: %v", err)
	}
	p.start()
	k.use("v", id, "ext4")
	wantFile(t, k.target("v")+"/f", []byte("hello"))
	k.dispose("v", id)
	k.finish()
}

// TestPodHoldsDeadMount: an open file keeps the old device; staging again works
// beside it, and the old device goes when the file is closed.
func TestPodHoldsDeadMount(t *testing.T) {
	p := newProcess(t)
	p.alone = true
	p.start()
	k := newKubelet(p)
	id := k.useNew("v", "ext4")
	writeFile(t, k.target("v")+"/f", []byte("hello"))
	held, err := os.Open(k.target("v") + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	p.signal(syscall.SIGKILL)
	p.start()
	k.use("v", id, "ext4")
	wantFile(t, k.target("v")+"/f", []byte("hello"))
	k.unuse("v", id)
	k.use("v", id, "ext4") // not taken for the device that is held
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	k.dispose("v", id)
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	p.wait("the device that was held to be taken away", func() bool {
		if err := p.restartCleanly(); err != nil {
			t.Fatal(err)
		}
		return len(p.loops()) == 0
	})
	p.start()
	k.finish()
}

// TestSecondProcessIsRefused: a pool and a run directory have one owner.
func TestSecondProcessIsRefused(t *testing.T) {
	p := newProcess(t)
	p.start()
	other, another := p.path("other"), p.path("another")
	if err := errors.Join(os.Mkdir(other, 0o700), os.Mkdir(another, 0o700)); err != nil {
		t.Fatal(err)
	}
	var refused sync.WaitGroup // at once: each waits for its predecessor to go
	for i, c := range []struct{ socket, pool, run, want string }{
		{p.path("b.sock"), p.pool(), p.path("run2"), "pool is in use by another process"},
		{p.path("c.sock"), other, p.path("run"), "is in use by another process"},
		{p.socket(), another, p.path("run3"), "served by another process"},
	} {
		refused.Go(func() { // ends with the process
			out, err := exec.Command(p.binary, "node", "--endpoint", "unix://"+c.socket, "--pool", "default="+c.pool, "--run-dir", c.run, "--node-id", fmt.Sprint("n", i)).CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !bytes.Contains(out, []byte(c.want)) {
				t.Errorf("socket %s, pool %s, run %s: %v\n%s", c.socket, c.pool, c.run, err, out)
			}
		})
	}
	refused.Wait()
	newKubelet(p).finish()
}
