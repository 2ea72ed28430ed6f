package imagebackend_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
	"csi-qcow2/qcow2"
)

// An imageKind is how a test wants its image made and opened.
type imageKind struct {
	format   string
	create   []string // options of qemu-img create
	readOnly bool
}

// newImage makes an image of size with qemu-img and opens it; the test's end
// closes and checks it.
func newImage(t *testing.T, k imageKind, size string) qcow2.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	qemutest.Img(t, append(append([]string{"create", "-q", "-f", k.format}, k.create...), path, size)...)
	disk := openImage(t, path, k, nil)
	t.Cleanup(func() {
		if err := disk.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if k.format == "qcow2" {
			qemutest.Check(t, path)
		}
	})
	return disk
}

// openImage opens an image; the caller closes it.
func openImage(t *testing.T, path string, k imageKind, backing qcow2.BackingOpener) qcow2.Disk {
	t.Helper()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: k.readOnly})
	if err != nil {
		t.Fatal(err)
	}
	var disk qcow2.Disk
	if k.format == "raw" {
		disk, err = qcow2.OpenRaw(f, qcow2.RawOptions{ReadOnly: k.readOnly, PassDiscard: true})
	} else {
		disk, err = qcow2.Open(t.Context(), f, qcow2.Options{ReadOnly: k.readOnly, PassDiscard: true, OpenBacking: backing})
	}
	if err != nil {
		f.Close()
		t.Fatal(err)
	}
	return disk
}

func TestBackendConforms(t *testing.T) {
	for _, tt := range []struct {
		format string
		args   []string
		opts   imagebackend.Options
	}{
		{"raw", nil, imagebackend.Options{}},
		{"qcow2", nil, imagebackend.Options{}},
		{"qcow2", nil, imagebackend.Options{IgnoreDiscard: true}},
		{"qcow2", []string{"-o", "compat=0.10"}, imagebackend.Options{}},
		{"qcow2", []string{"-o", "cluster_size=512"}, imagebackend.Options{}},
		{"qcow2", []string{"-o", "cluster_size=2M"}, imagebackend.Options{}},
	} {
		t.Run(fmt.Sprint(tt.format, tt.args, tt.opts), func(t *testing.T) {
			nbdtest.TestBackend(t, func(t *testing.T) nbdexport.Backend {
				return imagebackend.New(newImage(t, imageKind{format: tt.format, create: tt.args}, "5M"), tt.opts)
			})
		})
	}
}

func TestReadOnlyIsEPERM(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		b := imagebackend.New(newImage(t, imageKind{format: format, readOnly: true}, "1M"), imagebackend.Options{})
		for what, err := range map[string]error{
			"write":   func() error { _, err := b.WriteAt(make([]byte, 512), 0); return err }(),
			"zeroes":  b.WriteZeroes(0, 512, true),
			"discard": b.Discard(0, 65536),
		} {
			if !errors.Is(err, syscall.EPERM) {
				t.Errorf("%s: %s: %v: want EPERM", format, what, err)
			}
		}
	}
}

// A failingDisk is a disk whose every call fails.
type failingDisk struct {
	qcow2.Disk
	err error
}

func (d failingDisk) ReadAt([]byte, int64) (int, error) { return 0, d.err }

// TestErrorsOfImages checks that each error that the engine documents reaches a
// client with a number of its own, and keeps its text.
func TestErrorsOfImages(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want syscall.Errno
	}{
		{qcow2.ErrReadOnly, syscall.EPERM},
		{qcow2.ErrOutOfRange, syscall.EINVAL},
		{qcow2.ErrClosed, syscall.ESHUTDOWN},
		{&qcow2.FormatError{Struct: "L2 table", Msg: "x"}, syscall.EIO},
		{fmt.Errorf("%w: %w", qcow2.ErrFailed, syscall.ENOSPC), syscall.EIO},
		{fmt.Errorf("write: %w", syscall.ENOSPC), syscall.ENOSPC},
		{errors.ErrUnsupported, syscall.EOPNOTSUPP},
	} {
		b := imagebackend.New(failingDisk{err: tt.err}, imagebackend.Options{})
		_, err := b.ReadAt(make([]byte, 1), 0)
		var got syscall.Errno
		if !errors.As(err, &got) || got != tt.want {
			t.Errorf("%v: number %v: want %v", tt.err, got, tt.want)
		}
		if !errors.Is(err, tt.err) || err.Error() != tt.err.Error() {
			t.Errorf("%v became %v", tt.err, err)
		}
	}
}

func TestFastZero(t *testing.T) {
	for _, tt := range []struct {
		format string
		args   []string
		want   bool
	}{
		{"raw", nil, false},
		{"qcow2", nil, true},
		{"qcow2", []string{"-o", "compat=0.10"}, false},
	} {
		b := imagebackend.New(newImage(t, imageKind{format: tt.format, create: tt.args}, "1M"), imagebackend.Options{})
		err := b.WriteZeroesFast(0, 65536, true)
		if got := err == nil; got != tt.want || !tt.want && !errors.Is(err, syscall.EOPNOTSUPP) {
			t.Errorf("%s %v: %v: want fast %v", tt.format, tt.args, err, tt.want)
		}
	}
}

func TestIgnoreDiscard(t *testing.T) {
	b := imagebackend.New(newImage(t, imageKind{format: "qcow2"}, "1M"), imagebackend.Options{IgnoreDiscard: true})
	p := []byte("precious")
	if _, err := b.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := b.Discard(0, 1<<20); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(p))
	if _, err := b.ReadAt(got, 0); err != nil || string(got) != string(p) {
		t.Errorf("after an ignored discard: %q, %v", got, err)
	}
}

func TestDepthOfABackingChain(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", base, "1M")
	qemutest.IO(t, base, "write -P 1 0 64k", "write -P 2 128k 64k")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
	qemutest.IO(t, top, "write -P 3 0 64k")
	kind := imageKind{format: "qcow2", readOnly: true}
	disk := openImage(t, top, kind, func(context.Context, string, string) (qcow2.Disk, error) {
		return openImage(t, base, kind, nil), nil
	})
	defer disk.Close()
	b := imagebackend.New(disk, imagebackend.Options{})
	for _, tt := range []struct {
		off  int64
		want nbdexport.Extent
	}{
		{0, nbdexport.Extent{Len: 64 << 10, Depth: 1}},
		{64 << 10, nbdexport.Extent{Len: 64 << 10, Hole: true, Zero: true}},
		{128 << 10, nbdexport.Extent{Len: 64 << 10, Depth: 2}},
	} {
		if got, err := b.BlockStatus(t.Context(), tt.off, 64<<10); err != nil || got != tt.want {
			t.Errorf("at %#x: %+v, %v: want %+v", tt.off, got, err, tt.want)
		}
	}
}
