package qcow2

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"testing"

	"csi-qcow2/internal/storagetest"
)

// The fuzz targets hold the codecs and the check to: no panic, no error whose
// cause a caller cannot tell, memory in proportion to the file.

// maxFuzzFile bounds inputs: more bytes find nothing more, only later.
const maxFuzzFile = 64 << 10

func addImages(f *testing.F) {
	f.Helper()
	for _, path := range golden(f) {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		// Faults in each structure, for a start.
		for _, off := range []int{0x28, 0x30, 0x48, 0x65, 0x200, 0x400, 0x600, 0x800, 0x1000, 0x1800} {
			if off+1 < len(b) {
				poked := bytes.Clone(b)
				poked[off] ^= 0x81
				poked[off+1] ^= 0x32
				f.Add(poked)
			}
		}
	}
}

// allocated returns the bytes that fn allocates.
func allocated(fn func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	fn()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func FuzzOpenHeader(f *testing.F) {
	addImages(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxFuzzFile {
			return
		}
		d := fileOf(t, b)
		n := allocated(func() {
			h, err := readHeader(d)
			if err != nil {
				if !errors.Is(err, ErrNotQcow2) && !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrCorrupt) {
					t.Errorf("readHeader: %v", err)
				}
				return
			}
			if err := validateTables(d, h); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Errorf("validateTables: %v", err)
			}
			_, _ = h.encodeCluster() // it may not fit with a backing format that is recorded twice
		})
		if n > 16<<20 {
			t.Errorf("%d bytes allocated for a file of %d", n, len(b))
		}
	})
}

func FuzzCheck(f *testing.F) {
	addImages(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > maxFuzzFile {
			return
		}
		d := fileOf(t, b)
		if h, err := readHeader(d); err != nil || h.clusterBits > 16 {
			return // each table reads as a whole cluster, which only takes time
		}
		ctx := context.Background()
		before, err := CheckFile(ctx, d, CheckOptions{Report: func(Problem) {}})
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("check: %v", err)
		}
		r, repairErr := CheckFile(ctx, d, CheckOptions{RepairAll: true})
		if err == nil && before.Clean() && (repairErr != nil || r.CorruptionsFixed+r.LeaksFixed != 0) {
			t.Fatalf("a clean image is repaired: %+v, %v", r, repairErr)
		}
		if repairErr != nil {
			if !errors.Is(repairErr, ErrCorrupt) && !errors.Is(repairErr, ErrTooLarge) {
				t.Fatalf("repair: %v", repairErr)
			}
			return
		}
		after, err := CheckFile(ctx, d, CheckOptions{})
		if err != nil || r.Clean() && !after.Clean() {
			t.Fatalf("after a repair %+v: %+v, %v", r, after, err)
		}
		if err := Dump(ctx, io.Discard, d); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("dump: %v", err)
		}
	})
}

func FuzzDecompress(f *testing.F) {
	for _, kind := range compressionTypes {
		packed := make([]byte, 4096)
		n, _ := compressCluster(kind, packed, compressible(4096, 3))
		f.Add(kind, packed[:n])
		f.Add(kind, packed[:n/2])
		f.Add(kind, packed[1:n])
	}
	f.Add(compressionZstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 31 << 3, 0x01, 0x00, 0x00})
	f.Add(uint8(9), []byte{})
	f.Fuzz(func(t *testing.T, kind uint8, src []byte) {
		dst := make([]byte, 4096)
		n := allocated(func() { _ = decompressCluster(kind, dst, src) })
		if n > 64<<20 {
			t.Errorf("%d bytes allocated for %d", n, len(src))
		}
	})
}

// TestCheckMemory: a sparse file that claims to be huge, with references all
// over it, costs memory for the references only.
func TestCheckMemory(t *testing.T) {
	d := storagetest.NewDisk()
	if err := Create(t.Context(), d, 1<<30, CreateOptions{ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	h, err := readHeader(d)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Truncate(1 << 55); err != nil {
		t.Fatal(err)
	}
	// 64 L2 tables of 64 entries, each of which points to a place of its own.
	var l1, l2 []uint64
	for i := range 64 {
		l1 = append(l1, uint64(makeL1(HostOffset(1<<40+i*512), true)))
	}
	for i := range 64 * 64 {
		l2 = append(l2, uint64(makeL2(HostOffset(1<<41+i<<42), true, false)))
	}
	if err := errors.Join(writeEntries(d, h.l1Offset, l1), writeEntries(d, 1<<40, l2)); err != nil {
		t.Fatal(err)
	}
	n := allocated(func() {
		r, err := CheckFile(t.Context(), d, CheckOptions{})
		if err != nil || r.Corruptions < 64*64 {
			t.Errorf("%+v, %v", r, err)
		}
	})
	if n > 32<<20 {
		t.Errorf("check allocates %d bytes", n)
	}
	n = allocated(func() {
		if r, err := CheckFile(t.Context(), d, CheckOptions{RepairAll: true}); !errors.Is(err, ErrTooLarge) || r.Clean() {
			t.Errorf("repair of an image that needs too many refcounts: %+v, %v", r, err)
		}
	})
	if n > 32<<20 {
		t.Errorf("repair allocates %d bytes", n)
	}
}
