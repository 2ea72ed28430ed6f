package nbdexport_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// BenchmarkFUSEDevice compares direct I/O on a FUSE device with direct I/O on a loop device over
// the same raw file.
func BenchmarkFUSEDevice(b *testing.B) {
	const size = 256 << 20
	for _, bs := range []int{4 << 10, 128 << 10, 1 << 20} {
		for _, kind := range []string{"fuse", "loop"} {
			for _, write := range []bool{false, true} {
				op := map[bool]string{false: "read", true: "write"}[write]
				b.Run(fmt.Sprintf("%s/%d/%s", op, bs, kind), func(b *testing.B) {
					benchmarkDevice(b, kind, size, bs, write)
				})
			}
		}
	}
}

func benchmarkDevice(b *testing.B, kind string, size int64, bs int, write bool) {
	path := filepath.Join(b.TempDir(), "disk.raw")
	backend, err := nbdtest.NewFileBackend(path, size)
	if err != nil {
		b.Fatal(err)
	}
	defer backend.Close()
	if err := backend.WriteZeroes(0, size, false); err != nil {
		b.Fatal(err)
	}
	var dev string
	switch kind {
	case "fuse":
		a, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		d, err := a.Attach(b.Context(), backend, nbdexport.DeviceOptions{ID: "bench", BlockSize: 4096})
		if err != nil {
			b.Fatal(err)
		}
		defer d.Detach(b.Context())
		dev = d.Path()
	case "loop":
		out, err := exec.Command("losetup", "-f", "--show", "-b", "4096", path).Output()
		if err != nil {
			b.Fatal(err)
		}
		dev = strings.TrimSpace(string(out))
		defer exec.Command("losetup", "-d", dev).Run()
	}
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	buf, err := unix.Mmap(-1, 0, bs, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Munmap(buf)
	b.SetBytes(int64(bs))
	b.ReportAllocs()
	off := int64(0)
	for b.Loop() {
		if write {
			_, err = f.WriteAt(buf, off)
		} else {
			_, err = f.ReadAt(buf, off)
		}
		if err != nil {
			b.Fatal(err)
		}
		off = (off + int64(bs)) % size
	}
}
