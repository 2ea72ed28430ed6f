package sanity

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// writers create, fill, sync and remove files in a directory until stopped.
func writers(t *testing.T, dir string) (stop func()) {
	t.Helper()
	var done atomic.Bool
	var all sync.WaitGroup
	for w := range 3 {
		all.Go(func() { // ends when done is set
			for i := 0; !done.Load(); i++ {
				name := fmt.Sprintf("%s/w%d-%d", dir, w, i%50)
				if err := os.WriteFile(name, make([]byte, 1000*(i%100)), 0o600); err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					if err := os.Remove(name); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	return func() {
		done.Store(true)
		all.Wait()
	}
}

// wantClean looks at the filesystem in a volume that nobody has mounted since the
// snapshot that it was made from: it needs no repair, and ext4 no recovery. XFS
// leaves a log behind when it is frozen, on purpose: the log holds nothing but
// the counters of the superblock, and inodes to remove.
func wantClean(t *testing.T, k *kubelet, name, id, fstype string) {
	t.Helper()
	k.use(name, id, "")
	defer k.unuse(name, id)
	run := func(args ...string) (string, error) {
		out, err := exec.Command(args[0], append(args[1:], k.target(name))...).CombinedOutput()
		return string(out), err
	}
	if fstype == "xfs" {
		out, _ := run("xfs_repair", "-n")
		if !strings.Contains(out, "No modify flag set, skipping filesystem flush and exiting.") {
			t.Errorf("xfs_repair -n does not get to its end:\n%s", out)
		}
		for line := range strings.Lines(out) {
			if !xfsSays.MatchString(line) {
				t.Errorf("xfs_repair -n, without the log: %q in\n%s", line, out)
			}
		}
		return
	}
	if out, err := run("e2fsck", "-f", "-n"); err != nil || strings.Contains(out, "recover") {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	if out, err := run("dumpe2fs", "-h"); err != nil || strings.Contains(out, "needs_recovery") {
		t.Errorf("dumpe2fs: %v, the journal is not clean:\n%s", err, out)
	}
}

// xfsSays matches what xfs_repair -n prints of a filesystem that is sound but for
// its log and the counters of its superblock.
var xfsSays = regexp.MustCompile(`^(Phase \d|\s+- |No modify flag set|sb_(fdblocks|icount|ifree) |` +
	`ALERT: The filesystem has valuable metadata changes in a log|ignored because the -n option|which may be resolved by first mounting)`)

// A snapshot of a filesystem under writers shows one that needs no recovery.
func TestFrozenSnapshot(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			_, k := startNode(t)
			source := k.useNew("source", fstype)
			stop := writers(t, k.target("source"))
			var restored []string
			for i := range 3 {
				snap := k.snapshot(fmt.Sprint("snap", i), source)
				restored = append(restored, k.create(fmt.Sprint("restored", i), 512, fromSnapshot(snap), fstype))
				k.deleteSnapshot(snap)
			}
			stop()
			for i, id := range restored {
				wantClean(t, k, fmt.Sprint("restored", i), id, fstype)
				k.deleteVolume(id)
			}
			k.dispose("source", source)
			k.finish()
		})
	}
}

// A writer that puts a growing number into one mounted volume after the other,
// syncing each, is seen at one moment by all snapshots of a group.
func TestGroupOfMountedVolumes(t *testing.T) {
	const volumes = 2
	p, k := startNode(t)
	groups := csi.NewGroupControllerClient(k.conn)
	var ids []string
	for i := range volumes {
		name := fmt.Sprint("source", i)
		ids = append(ids, k.create(name, 512, nil, "ext4"))
		k.use(name, ids[i], "ext4")
	}
	var done atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() { // ends when done is set
		for n := uint64(1); !done.Load(); n++ {
			f, err := os.OpenFile(k.target(fmt.Sprint("source", n%volumes))+"/number", os.O_WRONLY|os.O_CREATE|os.O_SYNC, 0o600)
			if err == nil {
				_, err = f.Write(binary.BigEndian.AppendUint64(nil, n))
				f.Close()
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	p.wait("the first numbers", func() bool {
		for i := range volumes {
			if b, _ := os.ReadFile(k.target(fmt.Sprint("source", i)) + "/number"); len(b) != 8 {
				return false
			}
		}
		return true
	})
	var resp *csi.CreateVolumeGroupSnapshotResponse
	k.must("snapshot the group", func() (err error) {
		resp, err = groups.CreateVolumeGroupSnapshot(k.rpc(), &csi.CreateVolumeGroupSnapshotRequest{Name: "group", SourceVolumeIds: ids})
		return err
	})
	done.Store(true)
	writer.Wait()
	g := resp.GetGroupSnapshot()
	var numbers []uint64
	var members []string
	for i, snap := range g.GetSnapshots() {
		members = append(members, snap.GetSnapshotId())
		name := fmt.Sprint("restored", i)
		id := k.create(name, 512, fromSnapshot(snap.GetSnapshotId()), "ext4")
		wantClean(t, k, name, id, "ext4")
		k.deleteVolume(id)
		id = k.create(name, 512, fromSnapshot(snap.GetSnapshotId()), "ext4")
		k.use(name, id, "ext4")
		b, err := os.ReadFile(k.target(name) + "/number")
		if err != nil || len(b) != 8 {
			t.Fatalf("number: %x, %v", b, err)
		}
		numbers = append(numbers, binary.BigEndian.Uint64(b))
		k.dispose(name, id)
	}
	if d := int64(numbers[0] - numbers[1]); d != 1 && d != -1 {
		t.Errorf("last numbers %d: want neighbours", numbers)
	}
	k.must("delete the group", func() error {
		_, err := groups.DeleteVolumeGroupSnapshot(k.rpc(), &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: g.GetGroupSnapshotId(), SnapshotIds: members})
		return err
	})
	for i, id := range ids {
		k.dispose(fmt.Sprint("source", i), id)
	}
	k.finish()
}

// The process is killed again and again while it takes snapshots of a filesystem
// under writers. Whatever it was doing, the filesystem is not left frozen: with
// the next process, the writers go on.
func TestKilledWhileSnapshotting(t *testing.T) {
	p, k := startNode(t)
	id := k.useNew("source", "ext4")
	stop := writers(t, k.target("source"))
	random := rand.New(rand.NewPCG(1, uint64(os.Getpid())))
	for round := range 6 {
		p.wait("a snapshot", func() bool { // the device has to be taken over first
			_, err := k.CreateSnapshot(k.rpc(), &csi.CreateSnapshotRequest{Name: fmt.Sprint("first-", round), SourceVolumeId: id})
			return err == nil
		})
		var killed atomic.Bool
		ended := make(chan struct{})
		go func() { // ends with the process
			defer close(ended)
			for i := 0; !killed.Load(); i++ {
				name := fmt.Sprintf("snap-%d-%d", round, i)
				_, err := k.CreateSnapshot(k.rpc(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
				if err != nil && !again(err) {
					t.Errorf("%s: %v", name, err)
					return
				}
			}
		}()
		// The moment of the kill is what varies.
		time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
		killed.Store(true)
		if err := p.signal(syscall.SIGKILL); err == nil {
			t.Fatal("the process ended well after SIGKILL")
		}
		<-ended
		p.start()
		written := make(chan error, 1)
		go func() { // ends when the filesystem answers
			written <- os.WriteFile(k.target("source")+"/probe", []byte{byte(round)}, 0o600)
		}()
		p.wait("a write after the kill", succeeded(t, written))
		p.wait("the filesystem to be thawed", func() bool {
			records, err := os.ReadDir(p.path("run/frozen"))
			return os.IsNotExist(err) || len(records) == 0
		})
	}
	stop()
	for _, snap := range k.snapshots() {
		k.deleteSnapshot(snap)
	}
	k.dispose("source", id)
	k.finish()
}

// succeeded returns a function that reports whether done has had an end, which must be one without an error.
func succeeded(t *testing.T, done <-chan error) func() bool {
	return func() bool {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			return true
		default:
			return false
		}
	}
}
