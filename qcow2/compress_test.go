package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
)

var compressionTypes = map[string]uint8{"zlib": compressionZlib, "zstd": compressionZstd}

// compressible returns n bytes with matches far and near.
func compressible(n int, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 0))
	b := make([]byte, n)
	for i := range b {
		switch {
		case i < 64:
			b[i] = byte(rng.Uint32())
		case rng.IntN(50) == 0:
			b[i] = byte(rng.Uint32())
		default:
			b[i] = b[i-1-rng.IntN(min(i, 60))]
		}
	}
	for i := 20000; i < n; i += 20000 { // a match beyond the window of QEMU's inflate
		copy(b[i:], b[:300])
	}
	return b
}

func TestCompressRoundTrip(t *testing.T) {
	for name, kind := range compressionTypes {
		for _, size := range []int{512, 4096, 64 << 10, 256 << 10} {
			src := compressible(size, uint64(size))
			packed := make([]byte, size)
			n, ok := compressCluster(kind, packed, src)
			if !ok || n >= size {
				t.Errorf("%s, %d bytes: %d, %t", name, size, n, ok)
				continue
			}
			rng := rand.New(rand.NewPCG(9, 9))
			for _, trailer := range [][]byte{nil, make([]byte, 400), packed[:min(n, 300)], {byte(rng.Uint32()), 2, 3}} {
				got := make([]byte, size)
				if err := decompressCluster(kind, got, append(packed[:n:n], trailer...)); err != nil || !bytes.Equal(got, src) {
					t.Errorf("%s, %d bytes with %d bytes after them: %v", name, size, len(trailer), err)
				}
			}
			got := make([]byte, size)
			if err := decompressCluster(kind, got, packed[:n/2]); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%s, half of the data: %v", name, err)
			}
			if err := decompressCluster(kind, make([]byte, 2*size), packed[:n]); err == nil {
				t.Errorf("%s: less data than the cluster, and no error", name)
			}
			if _, ok := compressCluster(kind, packed[:n-1], src); ok {
				t.Errorf("%s: %d bytes in %d", name, n, n-1)
			}
		}
		noise := make([]byte, 4096)
		for i := range noise {
			noise[i] = byte(rand.Uint32())
		}
		if n, ok := compressCluster(kind, make([]byte, 4096), noise); ok {
			t.Errorf("%s: noise of 4096 bytes fits into %d", name, n)
		}
	}
	if err := decompressCluster(2, make([]byte, 512), make([]byte, 512)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("type 2: %v", err)
	}
}

// TestDecompressZstdWindow: a frame cannot make the decoder allocate what it likes.
func TestDecompressZstdWindow(t *testing.T) {
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 31 << 3, 0x01, 0x00, 0x00} // window of 2^41 bytes
	if err := decompressCluster(compressionZstd, make([]byte, 512), frame); err == nil {
		t.Error("no error")
	}
}

// TestDecompressQemu reads what QEMU has compressed.
func TestDecompressQemu(t *testing.T) {
	dir := t.TempDir()
	raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "im.qcow2")
	want := compressible(1<<20, 1)
	if err := os.WriteFile(raw, want, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, kind := range compressionTypes {
		qemutest.Img(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+name, raw, path)
		d := loadDisk(t, path)
		h, err := readHeader(d)
		if err != nil {
			t.Fatal(err)
		}
		c := checker{f: d, g: h.geometry(), fileBytes: 1 << 40}
		l1, err := c.readEntries(h.l1Offset, 1)
		if err != nil {
			t.Fatal(err)
		}
		l2, err := c.readEntries(l1Entry(l1[0]).offset(), int64(len(want))>>h.clusterBits)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range l2 {
			off, n := l2Entry(e).compressedRange(&c.g)
			src, got := make([]byte, n), make([]byte, c.g.clusterSize)
			if err := readZeroed(d, src, off); err != nil {
				t.Fatal(err)
			}
			if err := decompressCluster(kind, got, src); err != nil || !bytes.Equal(got, want[i<<h.clusterBits:][:len(got)]) {
				t.Errorf("%s, cluster %d: %v", name, i, err)
			}
		}
	}
}

// TestQemuDecompresses lets QEMU read what we have compressed: its inflate has
// a window of 4 KiB.
func TestQemuDecompresses(t *testing.T) {
	for name, kind := range compressionTypes {
		want := compressible(1<<20, 2)
		d := storagetest.NewDisk()
		if err := Create(context.Background(), d, int64(len(want)), CreateOptions{CompressionType: name, Preallocation: PreallocationMetadata}); err != nil {
			t.Fatal(err)
		}
		h, err := readHeader(d)
		if err != nil {
			t.Fatal(err)
		}
		g := h.geometry()
		l, err := newLayout(g, int64(len(want)), int64(len(want)))
		if err != nil {
			t.Fatal(err)
		}
		// Pack them from the first data cluster on; the repair does the refcounts.
		off := g.hostOffset(l.data)
		var l2 []byte
		for i := 0; i < len(want); i += int(g.clusterSize) {
			packed := make([]byte, g.clusterSize)
			n, ok := compressCluster(kind, packed, want[i:][:g.clusterSize])
			if !ok {
				t.Fatal("does not shrink")
			}
			if _, err := d.WriteAt(packed[:n], int64(off)); err != nil {
				t.Fatal(err)
			}
			l2 = binary.BigEndian.AppendUint64(l2, uint64(makeCompressed(&g, off, int64(n))))
			off += HostOffset(n)
		}
		if _, err := d.WriteAt(l2, int64(g.hostOffset(l.l2))); err != nil {
			t.Fatal(err)
		}
		if r, err := CheckFile(context.Background(), d, CheckOptions{RepairAll: true}); err != nil || !r.Clean() {
			t.Fatalf("%+v, %v", r, err)
		}
		path := filepath.Join(t.TempDir(), "im.qcow2")
		if err := d.Dump(path); err != nil {
			t.Fatal(err)
		}
		qemutest.Check(t, path)
		if out, err := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, path+".raw").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", name, err, out)
		}
		if got, err := os.ReadFile(path + ".raw"); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: QEMU reads something else (%v)", name, err)
		}
	}
}

func BenchmarkDecompress(b *testing.B) {
	for name, kind := range compressionTypes {
		b.Run(name, func(b *testing.B) {
			src := compressible(64<<10, 1)
			packed := make([]byte, len(src))
			n, _ := compressCluster(kind, packed, src)
			dst := make([]byte, len(src))
			b.SetBytes(int64(len(src)))
			b.ReportAllocs()
			for b.Loop() {
				if err := decompressCluster(kind, dst, packed[:n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
