package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"csi-qcow2/internal/qemutest"
)

// forFormats runs a test with a server of an image in each format, and checks
// the image afterwards.
func forFormats(t *testing.T, test func(t *testing.T, p *nbdProcess, format, image string)) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			image := newImage(t, format)
			p := startNBD(t, "-t", "-e", "8", "--discard=unmap", "-f", format, image)
			test(t, p, format, image)
			p.cmd.Process.Signal(syscall.SIGTERM)
			p.waitEnd(0)
			if format == "qcow2" {
				tool(t, qemutest.Package, "qemu-img", "check", image)
			}
		})
	}
}

// TestNBDInfoAsQEMU compares what nbdinfo says about our export with what it
// says about qemu-nbd's of the same image.
func TestNBDInfoAsQEMU(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			image := newImage(t, format)
			ours := startNBD(t, "-t", "-r", "-f", format, image).uri
			theirs := "nbd+unix:///?socket=" + qemutest.Serve(t, format, image, "-r", "-A")
			for _, context := range []string{"base:allocation", "qemu:allocation-depth"} {
				args := []string{"--json", "--map=" + context}
				got := decodeMap(t, tool(t, "libnbd-bin", "nbdinfo", append(args, ours)...))
				want := decodeMap(t, tool(t, "libnbd-bin", "nbdinfo", append(args, theirs)...))
				if !reflect.DeepEqual(got, want) {
					t.Errorf("%s:\ngot  %v\nwant %v", context, got, want)
				}
			}
		})
	}
}

// TestNBDInfoCan checks that nbdinfo finds everything that can be announced.
func TestNBDInfoCan(t *testing.T) {
	forFormats(t, func(t *testing.T, p *nbdProcess, _, _ string) {
		for _, can := range []string{"connect", "read", "write", "cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "zero", "structured-reply"} {
			if _, code := toolCode(t, "libnbd-bin", "nbdinfo", "--can", can, p.uri); code != 0 {
				t.Errorf("nbdinfo --can %s: no", can)
			}
		}
	})
}

// A mapEntry is a range in the output of nbdinfo --map --json.
type mapEntry struct {
	Offset, Length int64
	Type           int
}

// decodeMap decodes a map, with adjacent ranges of one type merged: servers may
// cut where they like.
func decodeMap(t *testing.T, out string) []mapEntry {
	t.Helper()
	var all, merged []mapEntry
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, e := range all {
		if n := len(merged); n > 0 && merged[n-1].Type == e.Type {
			merged[n-1].Length += e.Length
			continue
		}
		merged = append(merged, e)
	}
	return merged
}

func TestNBDCopyBothWays(t *testing.T) {
	forFormats(t, func(t *testing.T, p *nbdProcess, format, image string) {
		out := filepath.Join(t.TempDir(), "out.raw")
		tool(t, "libnbd-bin", "nbdcopy", "--connections=4", "--requests=64", p.uri, out)
		tool(t, qemutest.Package, "qemu-img", "compare", "-f", "raw", "-F", "raw", out, p.uri)

		in := filepath.Join(t.TempDir(), "in.raw")
		if err := os.WriteFile(in, pattern(64<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		tool(t, "libnbd-bin", "nbdcopy", "--connections=4", "--requests=64", "--request-size=1048576", "--flush", in, p.uri)
		tool(t, qemutest.Package, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, p.uri)
		tool(t, "libnbd-bin", "nbdcopy", "--connections=2", "--synchronous", p.uri, out)
		tool(t, qemutest.Package, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, out)
	})
}

// TestNBDCopyFromAServerForOneClient checks that nbdcopy, which opens four
// connections where it may, is not led into waiting for itself.
func TestNBDCopyFromAServerForOneClient(t *testing.T) {
	p := startNBD(t, "-t", "-f", "raw", newImage(t, "raw"))
	out := filepath.Join(t.TempDir(), "out.raw")
	tool(t, "libnbd-bin", "nbdcopy", p.uri, out)
	qemutest.Img(t, "compare", "-f", "raw", "-F", "raw", p.uri, out)
}

// pattern returns n bytes that differ from block to block, with holes.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(1)
	for off := 0; off < n; off += 4096 {
		if off>>18&3 == 3 {
			continue // 256 KiB of zeroes in each MiB
		}
		for i := off; i < off+4096; i += 4 {
			x = x*1664525 + 1013904223
			b[i], b[i+1], b[i+2], b[i+3] = byte(x), byte(x>>8), byte(x>>16), byte(x>>24)
		}
	}
	return b
}

func TestNBDQEMUImgConvertAndCompare(t *testing.T) {
	forFormats(t, func(t *testing.T, p *nbdProcess, format, image string) {
		dir := t.TempDir()
		out := filepath.Join(dir, "out.qcow2")
		qemutest.Img(t, "convert", "-f", "raw", "-O", "qcow2", "-m", "16", "-W", p.uri, out)
		qemutest.Img(t, "compare", "-f", "raw", "-F", "qcow2", p.uri, out)

		in := filepath.Join(dir, "in.raw")
		if err := os.WriteFile(in, pattern(64<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		qemutest.Img(t, "convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", in, p.uri)
		qemutest.Img(t, "compare", "-f", "raw", "-F", "raw", p.uri, in)
		qemutest.Img(t, "convert", "-n", "-f", "raw", "-O", "raw", "-S", "4k", in, p.uri)
		qemutest.Img(t, "compare", "-f", "raw", "-F", "raw", p.uri, in)
	})
}

func TestNBDQEMUIO(t *testing.T) {
	forFormats(t, func(t *testing.T, p *nbdProcess, format, image string) {
		qemutest.IOFormat(t, "raw", p.uri,
			"read -P 0x11 1M 3M", "read -P 0x22 9M 64k", "read -P 0 20M 1M",
			"write -P 0x61 12345 70001", "write -f -P 0x62 2M 512", "write -z 3M 100000", "write -z -u 9M 32k",
			"discard 10M 1M", "write -P 0x63 63M 1M", "flush",
			"read -P 0x61 12345 70001", "read -P 0x62 2M 512", "read -P 0 3M 100000", "read -P 0 9M 32k",
			"read -P 0x22 9469952 32k", "read -P 0 10M 1M", "read -P 0x63 63M 1M")
	})
}

func TestNBDFioVerify(t *testing.T) {
	forFormats(t, func(t *testing.T, p *nbdProcess, format, image string) {
		for _, bs := range []string{"--bs=4k", "--bsrange=512-128k", "--bs=1m"} {
			tool(t, "fio", "fio", "--name=verify", "--ioengine=nbd", "--uri="+p.uri, "--rw=randwrite", bs, "--blockalign=512",
				"--iodepth=16", "--size=16m", "--numjobs=2", "--offset_increment=32m", "--verify=crc32c", "--verify_fatal=1",
				"--fsync=64", "--norandommap=0", "--serialize_overlap=1", "--output-format=terse")
		}
	})
}

// TestNBDAlternatesWithQEMU alternates owners: what we served and
// flushed is what QEMU finds, and the reverse.
func TestNBDAlternatesWithQEMU(t *testing.T) {
	image := newImage(t, "qcow2")
	for i := range 4 {
		p := startNBD(t, "-t", "-f", "qcow2", "--discard=unmap", image)
		qemutest.IOFormat(t, "raw", p.uri, "write -P 0x71 5M 300k", "write -z -u 6M 128k", "discard 7M 1M")
		p.cmd.Process.Signal(syscall.SIGTERM)
		p.waitEnd(0)
		tool(t, qemutest.Package, "qemu-img", "check", image)
		qemutest.IO(t, image, "read -P 0x71 5M 300k", "read -P 0 6M 128k", "write -P 0x72 5M 100k")
		qemutest.Img(t, "snapshot", "-c", strings.Repeat("s", i+1), image)
		tool(t, qemutest.Package, "qemu-img", "check", image)
	}
}
