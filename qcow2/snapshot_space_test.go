package qcow2_test

import (
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// hostBytes returns what the host has allocated for the file at path, as du does.
func hostBytes(t testing.TB, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestDiscardReachesTheHost looks at the space of the host file: a discard gives
// it back at the next flush; what a snapshot shares stays until the snapshot
// goes, and then comes back whole.
func TestDiscardReachesTheHost(t *testing.T) {
	for _, clusterSize := range []int64{4 << 10, 64 << 10} {
		const size, half = 32 << 20, 16 << 20
		const slack = 2 << 20 // tables
		path := filepath.Join(scratch(t), "space.qcow2")
		createFile(t, path, size, qcow2.CreateOptions{ClusterSize: clusterSize})
		im := useFile(t, path, qcow2.Options{PassDiscard: true})
		do := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		write := func(off, n int64) {
			t.Helper()
			_, err := im.WriteAt(fill(n, uint64(off)), off)
			do(err)
		}
		want := func(what string, bytes int64) {
			t.Helper()
			do(im.Flush())
			if got := hostBytes(t, path); got < bytes || got > bytes+slack {
				t.Errorf("clusters of %d, %s: the host file has %d bytes, want %d and at most %d of tables", clusterSize, what, got, bytes, slack)
			}
		}
		write(0, size)
		want("full", size)
		do(im.Discard(half, half))
		want("half discarded", half)
		write(half, half)
		want("full again", size)

		s, err := im.CreateSnapshot(t.Context(), qcow2.Snapshot{Name: "s"})
		do(err)
		do(im.Discard(0, half))
		want("discarded over a snapshot", size)
		write(half, half/2)
		want("overwritten over a snapshot", size+half/2)
		do(im.Discard(half, half/2))
		want("discarded what was written since", size)
		do(im.DeleteSnapshot(t.Context(), s.ID))
		want("without the snapshot", half/2)
		do(im.WriteZeroes(half, half, true))
		want("zeroed", 0)
	}
}

// TestOpenReservesTables: a table that found the host full when it is written back
// would fail the image, and those of a new image are holes.
func TestOpenReservesTables(t *testing.T) {
	path := filepath.Join(scratch(t), "new.qcow2")
	createFile(t, path, 16<<40, qcow2.CreateOptions{})
	im := useFile(t, path, qcow2.Options{})
	const want = 2*64<<10 + 16<<40/(512<<20)*8 // refcount table and block, L1 table
	if got := hostBytes(t, path); got < want {
		t.Errorf("the host has %d bytes for an image without data, want %d for its tables", got, want)
	}
	mustClose(t, im)
}

// TestOpenInFullPool opens an image where no space can be reserved.
func TestOpenInFullPool(t *testing.T) {
	for _, cause := range []error{unix.ENOSPC, unix.EDQUOT, errors.ErrUnsupported} {
		d := newDisk(t, 1<<20, qcow2.CreateOptions{})
		d.Inject(&storagetest.Fault{Ops: storagetest.OpAllocate, N: 1, Err: cause, Sticky: true})
		mustClose(t, useDisk(t, d, qcow2.Options{}))
	}
}
