package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestChangedBlocks: what a backup program is told of two snapshots is what
// differs between the devices that are restored from them. The call goes the
// way of the snapshot metadata sidecar: to a controller, and from there to the node.
func TestChangedBlocks(t *testing.T) {
	onlyStandard(t, "only its controller takes calls for changed blocks")
	t.Parallel()
	const chunk, chunks = 64 << 10, 512
	s := newSpace(t)
	s.claim("source", "32Mi", block)
	s.start("writer", s.withClaim("source"))
	s.sh("writer", "dd if=/dev/urandom of="+devicePath+" bs=1M seek=1 count=4 conv=fsync 2>/dev/null")
	s.snapshot("base", "source")
	// Within what was there, across its end, and far away; and some zeroes.
	for _, at := range []string{"bs=64k seek=20 count=3", "bs=4k seek=1278 count=4", "bs=1M seek=24 count=2"} {
		s.sh("writer", "dd if=/dev/urandom of="+devicePath+" conv=notrunc,fsync "+at+" 2>/dev/null")
	}
	s.sh("writer", "dd if=/dev/zero of="+devicePath+" bs=64k seek=40 count=2 conv=notrunc,fsync 2>/dev/null")
	s.snapshot("target", "source")
	s.write("writer", devicePath, 32) // of what is written later nothing is told

	sums := make(map[string][]string)
	for _, name := range []string{"base", "target"} {
		s.claim(name, "32Mi", block, fromSnapshot(name))
		s.start(name, s.withClaim(name))
		sums[name] = strings.Fields(s.sh(name, fmt.Sprintf(
			"i=0; while [ $i -lt %d ]; do dd if=%s bs=%d skip=$i count=1 2>/dev/null | md5sum | cut -c1-32; i=$((i+1)); done", chunks, devicePath, chunk)))
		if len(sums[name]) != chunks {
			t.Fatalf("%s: %d sums, want %d", name, len(sums[name]), chunks)
		}
	}
	metadata := csi.NewSnapshotMetadataClient(dialController(t))
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	base, target := s.snapshotHandle("base"), s.snapshotHandle("target")

	delta, err := metadata.GetMetadataDelta(ctx, &csi.GetMetadataDeltaRequest{BaseSnapshotId: base, TargetSnapshotId: target})
	if err != nil {
		t.Fatal(err)
	}
	told, size := chunksOf(t, chunk, delta.Recv)
	for i := range chunks {
		if differ := sums["base"][i] != sums["target"][i]; differ && !told[i] {
			t.Errorf("chunk %d differs, and nothing is told of it", i)
		} else if !differ && told[i] {
			t.Errorf("chunk %d is told, and does not differ", i)
		}
	}
	if size != 32<<20 {
		t.Errorf("the volume has %d bytes, want 32 MiB", size)
	}

	allocated, err := metadata.GetMetadataAllocated(ctx, &csi.GetMetadataAllocatedRequest{SnapshotId: base})
	if err != nil {
		t.Fatal(err)
	}
	told, _ = chunksOf(t, chunk, allocated.Recv)
	zero := sums["base"][chunks-1] // nobody has written there
	for i, sum := range sums["base"] {
		if sum != zero && !told[i] {
			t.Errorf("chunk %d of the base has data, and nothing is told of it", i)
		}
	}
	if len(told) != 64 {
		t.Errorf("%d chunks of the base are allocated, want 64", len(told))
	}
}

// chunksOf reads a stream of ranges and returns the chunks that they touch, and
// the size of the volume.
func chunksOf[M interface {
	GetBlockMetadata() []*csi.BlockMetadata
	GetVolumeCapacityBytes() int64
}](t *testing.T, chunk int64, next func() (M, error)) (touched map[int]bool, size int64) {
	t.Helper()
	touched = make(map[int]bool)
	for {
		m, err := next()
		if errors.Is(err, io.EOF) {
			return touched, size
		}
		if err != nil {
			t.Fatal(err)
		}
		size = m.GetVolumeCapacityBytes()
		for _, r := range m.GetBlockMetadata() {
			for at := r.GetByteOffset() / chunk; at*chunk < r.GetByteOffset()+r.GetSizeBytes(); at++ {
				touched[int(at)] = true
			}
		}
	}
}

// snapshotHandle returns the driver's name of a snapshot.
func (s *space) snapshotHandle(name string) string {
	s.t.Helper()
	snapshot, err := snapshots.SnapshotV1().VolumeSnapshots(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	content, err := snapshots.SnapshotV1().VolumeSnapshotContents().Get(s.t.Context(), *snapshot.Status.BoundVolumeSnapshotContentName, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return *content.Status.SnapshotHandle
}
