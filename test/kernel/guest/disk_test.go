//go:build kernelguest

package guest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
	"csi-qcow2/qcow2"
)

// A disk is what is attached: a raw file or an image.
type disk interface {
	nbdexport.Backend
	Grow(size int64) error
	// Close checks that the disk is sound, as far as its format can tell.
	Close() error
}

// newDisk returns a disk of a format on the guest's memory file system.
func newDisk(t *testing.T, format string, size int64) disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	var d disk
	var err error
	switch format {
	case "raw":
		d, err = nbdtest.NewFileBackend(path, size)
	case "qcow2":
		d, err = newImageDisk(path, size)
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// imageDisk is a qcow2 image as a disk.
type imageDisk struct {
	nbdexport.Backend
	path  string
	image *qcow2.Image
	cache *cache.Cache
}

func newImageDisk(path string, size int64) (*imageDisk, error) {
	ctx := context.Background()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	file, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		return nil, err
	}
	if err := qcow2.Create(ctx, file, size, qcow2.CreateOptions{}); err != nil {
		return nil, err
	}
	c, err := cache.New(cache.Options{Bytes: 8 << 20})
	if err != nil {
		return nil, err
	}
	image, err := qcow2.Open(ctx, file, qcow2.Options{Cache: c})
	if err != nil {
		return nil, err
	}
	return &imageDisk{Backend: imagebackend.New(image, imagebackend.Options{}), path: path, image: image, cache: c}, nil
}

func (d *imageDisk) Grow(size int64) error { return d.image.Resize(context.Background(), size) }

func (d *imageDisk) Close() error {
	if err := errors.Join(d.image.Close(), d.cache.Close()); err != nil {
		return err
	}
	file, err := qcow2.OpenFile(d.path, qcow2.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer file.Close()
	result, err := qcow2.CheckFile(context.Background(), file, qcow2.CheckOptions{})
	if err == nil && !result.Clean() {
		err = errors.New("the image is not clean")
	}
	return err
}
