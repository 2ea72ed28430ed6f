package qcow2

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
)

// TestSparseStatus looks for holes in an image with preallocated metadata, and
// through an overlay.
func TestSparseStatus(t *testing.T) {
	const size = 64 << 20
	file := newOSFile(t, filepath.Join(t.TempDir(), "base"), FileOptions{})
	if err := Create(t.Context(), file, size, CreateOptions{Preallocation: PreallocationMetadata}); err != nil {
		t.Fatal(err)
	}
	base, err := Open(t.Context(), file, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := base.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 8<<20); err != nil {
		t.Fatal(err)
	}
	over := newOSFile(t, filepath.Join(t.TempDir(), "over"), FileOptions{})
	if err := Create(t.Context(), over, size, CreateOptions{BackingFile: "base", BackingFormat: "qcow2"}); err != nil {
		t.Fatal(err)
	}
	top, err := Open(t.Context(), over, Options{OpenBacking: func(context.Context, string, string) (Disk, error) { return base, nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close() // and base
	for depth, im := range []*Image{base, top} {
		data, calls := int64(0), 0
		for off := int64(0); off < size; calls++ {
			e, err := im.SparseStatus(t.Context(), off, size-off)
			if err != nil || e.Off != off || e.Len <= 0 || !e.Data || e.Depth != depth {
				t.Fatalf("SparseStatus(%#x) = %+v, %v", off, e, err)
			}
			if !e.Zero {
				data += e.Len
			}
			off = e.End()
		}
		// A step of data may begin shortly before a hole.
		if data < 1<<20 || data > 3<<20 || calls > 8 {
			t.Errorf("depth %d: %d bytes of data in %d calls, want %d in a few", depth, data, calls, 1<<20)
		}
	}
}
