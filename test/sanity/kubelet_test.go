package sanity

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// A kubelet drives a process as a node's kubelet does.
type kubelet struct {
	p    *process
	conn *grpc.ClientConn
	csi.ControllerClient
	csi.NodeClient
}

func newKubelet(p *process) *kubelet {
	p.t.Helper()
	conn, err := grpc.NewClient("unix://"+p.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		// The next process serves within milliseconds of its start.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second},
			MinConnectTimeout: deadline,
		}))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return &kubelet{p, conn, csi.NewControllerClient(conn), csi.NewNodeClient(conn)}
}

// startNode starts a process, and a kubelet for it.
func startNode(t *testing.T) (*process, *kubelet) {
	t.Helper()
	p := newProcess(t)
	p.start()
	return p, newKubelet(p)
}

// rpc returns a context in which no call may hang.
func (k *kubelet) rpc() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	k.p.t.Cleanup(cancel)
	return ctx
}

// again reports whether err tells the caller to come back: the process was killed a
// moment ago, is at work on the volume, or ran out of time on a busy machine.
func again(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Aborted, codes.DeadlineExceeded:
		return true
	}
	return false
}

// must makes a call until it succeeds, as a kubelet does that is told to come back.
func (k *kubelet) must(what string, call func() error) {
	k.p.t.Helper()
	told := ""
	k.p.wait(what, func() bool {
		err := call()
		switch {
		case err == nil:
			return true
		case !again(err):
			k.p.t.Fatalf("%s: %v", what, err)
		case err.Error() != told:
			told = err.Error()
			k.p.t.Logf("%s, to be repeated: %v", what, err)
		}
		return false
	})
}

func capability(fstype string) *csi.VolumeCapability {
	c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER}}
	if fstype == "" {
		c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
	} else {
		c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fstype}}
	}
	return c
}

func (k *kubelet) create(name string, mib int64, source *csi.VolumeContentSource, fstype string) string {
	k.p.t.Helper()
	var resp *csi.CreateVolumeResponse
	k.must("create "+name, func() (err error) {
		resp, err = k.CreateVolume(k.rpc(), &csi.CreateVolumeRequest{Name: name, CapacityRange: &csi.CapacityRange{RequiredBytes: mib << 20},
			VolumeCapabilities: []*csi.VolumeCapability{capability(fstype)}, VolumeContentSource: source})
		return err
	})
	return resp.GetVolume().GetVolumeId()
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}

func (k *kubelet) staging(name string) string { return k.p.path("staging-" + name) }
func (k *kubelet) target(name string) string  { return filepath.Join(k.p.dir, "pods", name, "volume") }

func (k *kubelet) stage(name, id, fstype string) error {
	if err := os.MkdirAll(k.staging(name), 0o700); err != nil {
		return err
	}
	_, err := k.NodeStageVolume(k.rpc(), &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: k.staging(name), VolumeCapability: capability(fstype)})
	return err
}

func (k *kubelet) publish(name, id, fstype string) error {
	if err := os.MkdirAll(filepath.Dir(k.target(name)), 0o700); err != nil {
		return err
	}
	_, err := k.NodePublishVolume(k.rpc(), &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: k.staging(name),
		TargetPath: k.target(name), VolumeCapability: capability(fstype)})
	return err
}

// use stages and publishes.
func (k *kubelet) use(name, id, fstype string) {
	k.p.t.Helper()
	k.must("stage "+name, func() error { return k.stage(name, id, fstype) })
	k.must("publish "+name, func() error { return k.publish(name, id, fstype) })
}

// useNew makes a volume of 512 MiB and uses it.
func (k *kubelet) useNew(name, fstype string) (id string) {
	k.p.t.Helper()
	id = k.create(name, 512, nil, fstype)
	k.use(name, id, fstype)
	return id
}

func (k *kubelet) unuse(name, id string) {
	k.p.t.Helper()
	k.must("unpublish "+name, func() error {
		_, err := k.NodeUnpublishVolume(k.rpc(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: k.target(name)})
		return err
	})
	k.must("unstage "+name, func() error {
		_, err := k.NodeUnstageVolume(k.rpc(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: k.staging(name)})
		return err
	})
}

func (k *kubelet) deleteVolume(id string) {
	k.p.t.Helper()
	k.must("delete "+id, func() error {
		_, err := k.DeleteVolume(k.rpc(), &csi.DeleteVolumeRequest{VolumeId: id})
		return err
	})
}

// dispose undoes create and use.
func (k *kubelet) dispose(name, id string) {
	k.p.t.Helper()
	k.unuse(name, id)
	k.deleteVolume(id)
}

func (k *kubelet) snapshot(name, id string) string {
	k.p.t.Helper()
	var resp *csi.CreateSnapshotResponse
	k.must("snapshot "+name, func() (err error) {
		resp, err = k.CreateSnapshot(k.rpc(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
		return err
	})
	return resp.GetSnapshot().GetSnapshotId()
}

func (k *kubelet) deleteSnapshot(id string) {
	k.p.t.Helper()
	k.must("delete "+id, func() error {
		_, err := k.DeleteSnapshot(k.rpc(), &csi.DeleteSnapshotRequest{SnapshotId: id})
		return err
	})
}

// snapshots lists the IDs of all snapshots.
func (k *kubelet) snapshots() []string {
	k.p.t.Helper()
	var ids []string
	k.must("list the snapshots", func() error {
		resp, err := k.ListSnapshots(k.rpc(), &csi.ListSnapshotsRequest{})
		for _, e := range resp.GetEntries() {
			ids = append(ids, e.GetSnapshot().GetSnapshotId())
		}
		return err
	})
	return ids
}

// finish deletes nothing more: the pool must be empty, the end clean.
func (k *kubelet) finish() {
	k.p.t.Helper()
	k.p.wait("the pool to be empty", func() bool { return len(volumes(k.p.t, k.p)) == 0 })
	if err := k.p.signal(syscall.SIGTERM); err != nil {
		k.p.t.Errorf("SIGTERM: %v", err)
	}
	k.p.wantNothingLeft()
}

// writeFile writes and syncs a file.
func writeFile(t *testing.T, path string, content []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(content)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t *testing.T, path string, content []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%s: %d bytes, %v; want %d bytes as written", path, len(got), err, len(content))
	}
}

func writeDevice(t *testing.T, path string, content []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(content, 0)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func wantDevice(t *testing.T, path string, content []byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(content))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("%s: %v, or other bytes than were written", path, err)
	}
}

// sizeOf returns the size of the filesystem at path, in bytes.
func sizeOf(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}
