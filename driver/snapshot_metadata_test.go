package driver

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
)

const metadataCluster = 4096

// A metadataRig is a rig with a volume of 64 MiB.
type metadataRig struct {
	*rig
	csi.SnapshotMetadataClient
	id string
}

func newMetadataRig(t *testing.T) *metadataRig {
	r := newRig(t)
	const window = 64 << 10 // the smallest, and fixed: a sender does not get far ahead
	conn, err := grpc.NewClient("unix://"+filepath.Join(r.dir, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &metadataRig{rig: r, SnapshotMetadataClient: csi.NewSnapshotMetadataClient(conn)}
	m.id = m.create("v", nil)
	return m
}

func (m *metadataRig) create(name string, source *csi.VolumeContentSource) string {
	m.t.Helper()
	resp, err := m.CreateVolume(m.t.Context(), &csi.CreateVolumeRequest{Name: name, VolumeCapabilities: caps(blockCap()), VolumeContentSource: source,
		CapacityRange: &csi.CapacityRange{RequiredBytes: 64 << 20}, Parameters: map[string]string{"clusterSize": fmt.Sprint(metadataCluster)}})
	if err != nil {
		m.t.Fatal(err)
	}
	return resp.GetVolume().GetVolumeId()
}

// write writes whole clusters of a volume.
func (m *metadataRig) write(id string, clusters ...int64) {
	m.t.Helper()
	d, err := m.pool.Open(m.t.Context(), id)
	if err != nil {
		m.t.Fatal(err)
	}
	defer d.Close()
	for _, c := range clusters {
		if _, err := d.Image.WriteAt(make([]byte, metadataCluster), c*metadataCluster); err != nil {
			m.t.Fatal(err)
		}
	}
}

func (m *metadataRig) snapshot(name, id string) string {
	m.t.Helper()
	resp, err := m.CreateSnapshot(m.t.Context(), &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
	if err != nil {
		m.t.Fatal(err)
	}
	return resp.GetSnapshot().GetSnapshotId()
}

// A metadataReply is what both responses have.
type metadataReply interface {
	GetBlockMetadataType() csi.BlockMetadataType
	GetVolumeCapacityBytes() int64
	GetBlockMetadata() []*csi.BlockMetadata
}

// receive reads a stream to its end: ranges in clusters, "first+count".
func receive[R any, P interface {
	*R
	metadataReply
}](t *testing.T, stream grpc.ServerStreamingClient[R], err error, maxResults int) (string, error) {
	t.Helper()
	if err != nil {
		return "", err
	}
	text, messages := "", 0
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			if messages == 0 {
				t.Error("no message")
			}
			return text, nil
		}
		if err != nil {
			return text, err
		}
		messages++
		reply := P(msg)
		if reply.GetBlockMetadataType() != csi.BlockMetadataType_VARIABLE_LENGTH || reply.GetVolumeCapacityBytes() != 64<<20 {
			t.Errorf("type %v, capacity %d", reply.GetBlockMetadataType(), reply.GetVolumeCapacityBytes())
		}
		if n := len(reply.GetBlockMetadata()); maxResults > 0 && n > maxResults {
			t.Errorf("%d ranges in a message, want at most %d", n, maxResults)
		}
		for _, b := range reply.GetBlockMetadata() {
			text += fmt.Sprintf(" %d+%d", b.GetByteOffset()/metadataCluster, b.GetSizeBytes()/metadataCluster)
		}
	}
}

func (m *metadataRig) allocated(id string, off int64, maxResults int32) (string, error) {
	m.t.Helper()
	stream, err := m.GetMetadataAllocated(m.t.Context(), &csi.GetMetadataAllocatedRequest{SnapshotId: id, StartingOffset: off, MaxResults: maxResults})
	return receive(m.t, stream, err, int(maxResults))
}

func (m *metadataRig) delta(base, target string, off int64, maxResults int32) (string, error) {
	m.t.Helper()
	stream, err := m.GetMetadataDelta(m.t.Context(), &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target, StartingOffset: off, MaxResults: maxResults})
	return receive(m.t, stream, err, int(maxResults))
}

// TestSnapshotMetadata asks for what two snapshots of a volume and one of a
// clone hold and in what they differ, whole and in parts.
func TestSnapshotMetadata(t *testing.T) {
	m := newMetadataRig(t)
	none := m.snapshot("none", m.id)
	m.write(m.id, 1, 2, 5, 9000)
	a := m.snapshot("a", m.id)
	m.write(m.id, 2, 3, 7000)
	b := m.snapshot("b", m.id)
	clone := m.create("clone", &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{
		Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: a}}})
	m.write(clone, 5, 6)
	c := m.snapshot("c", clone)
	m.write(m.id, 4) // b is not the active state

	for _, test := range []struct{ base, target, want string }{
		{"", none, ""},
		{"", a, " 1+2 5+1 9000+1"},
		{"", b, " 1+3 5+1 7000+1 9000+1"},
		{"", c, " 1+2 5+2 9000+1"},
		{none, a, " 1+2 5+1 9000+1"},
		{a, b, " 2+2 7000+1"},
		{b, a, " 2+2 7000+1"},
		{a, a, ""},
		{a, c, " 5+2"},
		{b, c, " 2+2 5+2 7000+1"},
		{c, b, " 2+2 5+2 7000+1"},
	} {
		for _, maxResults := range []int32{0, 1, 2, 100} {
			ask := func(off int64) (string, error) {
				if test.base == "" {
					return m.allocated(test.target, off, maxResults)
				}
				return m.delta(test.base, test.target, off, maxResults)
			}
			if got, err := ask(0); err != nil || got != test.want {
				t.Errorf("%q to %q:%s, %v, want%s", test.base, test.target, got, err, test.want)
			}
			if got, err := ask(64 << 20); err != nil || got != "" {
				t.Errorf("%q to %q from the end:%s, %v", test.base, test.target, got, err)
			}
		}
	}
	if got, err := m.allocated(b, 2*metadataCluster, 0); err != nil || got != " 2+2 5+1 7000+1 9000+1" {
		t.Errorf("from cluster 2 on:%s, %v", got, err)
	}
	if got, err := m.delta(a, b, 3*metadataCluster, 1); err != nil || got != " 3+1 7000+1" {
		t.Errorf("from cluster 3 on:%s, %v", got, err)
	}
}

func TestSnapshotMetadataArguments(t *testing.T) {
	m := newMetadataRig(t)
	a, b := m.snapshot("a", m.id), m.snapshot("b", m.id)
	other := m.snapshot("other", m.create("stranger", nil))
	long := make([]byte, maxStringBytes+1)
	for i := range long {
		long[i] = 'x'
	}
	allocated := func(id string, off int64, n int32) func() error {
		return func() error { _, err := m.allocated(id, off, n); return err }
	}
	delta := func(base, target string, off int64, n int32) func() error {
		return func() error { _, err := m.delta(base, target, off, n); return err }
	}
	for what, c := range map[string]struct {
		call func() error
		want codes.Code
	}{
		"allocated, no ID":             {allocated("", 0, 0), codes.InvalidArgument},
		"allocated, long ID":           {allocated(string(long), 0, 0), codes.InvalidArgument},
		"allocated, unknown":           {allocated(b[:len(b)-4]+"0000", 0, 0), codes.NotFound},
		"allocated, volume ID":         {allocated(m.id, 0, 0), codes.NotFound},
		"allocated, no ID of ours":     {allocated("nonsense", 0, 0), codes.NotFound},
		"allocated, negative offset":   {allocated(a, -1, 0), codes.OutOfRange},
		"allocated, beyond the end":    {allocated(a, 64<<20+1, 0), codes.OutOfRange},
		"allocated, negative results":  {allocated(a, 0, -1), codes.InvalidArgument},
		"delta, no base":               {delta("", b, 0, 0), codes.InvalidArgument},
		"delta, no target":             {delta(a, "", 0, 0), codes.InvalidArgument},
		"delta, unknown base":          {delta("nonsense", b, 0, 0), codes.NotFound},
		"delta, unknown target":        {delta(a, "nonsense", 0, 0), codes.NotFound},
		"delta, of different volumes":  {delta(other, b, 0, 0), codes.InvalidArgument},
		"delta, beyond the end":        {delta(a, b, 64<<20+1, 0), codes.OutOfRange},
		"delta, negative offset":       {delta(a, b, -1, 0), codes.OutOfRange},
		"delta, negative results":      {delta(a, b, 0, -1), codes.InvalidArgument},
		"delta, as it should be asked": {delta(a, b, 0, 7), codes.OK},
	} {
		wantCode(t, what, c.call(), c.want)
	}
	m.driver.calls.drain()
	wantCode(t, "while the process stops", allocated(a, 0, 0)(), codes.Unavailable)
}

// TestSnapshotMetadataOfDeletedSnapshot deletes a snapshot while its ranges are
// being read: the answer is whole, and the space comes back after it.
func TestSnapshotMetadataOfDeletedSnapshot(t *testing.T) {
	m := newMetadataRig(t)
	var clusters []int64
	for c := int64(0); c < 8000; c++ { // more than the windows of a stream hold
		clusters = append(clusters, 2*c)
	}
	m.write(m.id, clusters...)
	snap := m.snapshot("s", m.id)
	stream, err := m.GetMetadataAllocated(t.Context(), &csi.GetMetadataAllocatedRequest{SnapshotId: snap, MaxResults: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.DeleteSnapshot(t.Context(), &csi.DeleteSnapshotRequest{SnapshotId: snap}); err != nil {
		t.Fatal(err)
	}
	kept := func() int {
		t.Helper()
		if _, err := m.pool.Reap(t.Context()); err != nil {
			t.Fatal(err)
		}
		d, err := m.pool.Open(t.Context(), m.id)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		return len(d.Image.Snapshots())
	}
	if n := kept(); n != 1 {
		t.Fatalf("%d snapshots in the image while one is read, want 1", n)
	}
	m.write(m.id, clusters...)
	ranges := 1
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		ranges++
	}
	if ranges != len(clusters) {
		t.Errorf("%d ranges, want %d", ranges, len(clusters))
	}
	m.driver.calls.running.Wait() // the handler has closed the snapshot
	if n := kept(); n != 0 {
		t.Errorf("%d snapshots in the image after the stream, want 0", n)
	}
	if _, err := m.allocated(snap, 0, 0); err == nil {
		t.Error("a deleted snapshot was found")
	}
}
