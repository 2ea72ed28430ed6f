package qcow2_test

import (
	"path/filepath"
	"testing"

	"csi-qcow2/qcow2"
)

// BenchmarkCheck checks an image of 256 GiB whose clusters are all allocated.
func BenchmarkCheck(b *testing.B) {
	path := filepath.Join(scratch(b), "im.qcow2")
	const size = 256 << 30
	createFile(b, path, size, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata})
	b.ReportAllocs()
	b.SetBytes(size / 65536 * 10) // an L2 entry and a refcount for each cluster
	for b.Loop() {
		if r, _, err := checkPath(b, path, qcow2.CheckOptions{}); err != nil || !r.Clean() || r.AllocatedClusters != size/65536 {
			b.Fatalf("%+v, %v", r, err)
		}
	}
}
