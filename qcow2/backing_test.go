package qcow2_test

import (
	"context"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// TestSetBackingWhileRead renames the backing file while a guest reads: the race
// detector looks on.
func TestSetBackingWhileRead(t *testing.T) {
	base, err := qcow2.OpenRaw(newDisk(t, 0, qcow2.CreateOptions{}), qcow2.RawOptions{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, 1<<20, qcow2.CreateOptions{BackingFile: "old", BackingFormat: "raw"})
	im := openDisk(t, d, qcow2.Options{OpenBacking: func(context.Context, string, string) (qcow2.Disk, error) { return base, nil }})
	if err := im.WriteCompressed(make([]byte, 64<<10), 0); err != nil {
		t.Fatal(err)
	}
	renamed, done := make(chan struct{}), make(chan error)
	go func() {
		p := make([]byte, 128<<10)
		for {
			_, err := im.ReadAt(p, 0)
			select {
			case <-renamed:
				done <- err
				return
			default:
			}
			if err != nil {
				<-renamed
				done <- err
				return
			}
		}
	}()
	for _, name := range []string{"new", "newer"} {
		if err := im.SetBacking(t.Context(), name, "raw"); err != nil {
			t.Error(err)
		}
		if got := im.Info(); got.BackingFile != name || got.BackingFormat != "raw" {
			t.Errorf("backing file %q, format %q", got.BackingFile, got.BackingFormat)
		}
	}
	close(renamed)
	if err := <-done; err != nil {
		t.Error(err)
	}
	mustClose(t, im)
}

// TestSetBackingAfterRefcountTableGrew renames the backing file of an image whose
// refcount table has moved since it was opened: the header must name the new one.
func TestSetBackingAfterRefcountTableGrew(t *testing.T) {
	const size = 16 << 20 // a refcount table of 512 bytes counts 8 MiB
	d := newDisk(t, size, qcow2.CreateOptions{ClusterSize: 512, BackingFile: "old", BackingFormat: "raw"})
	o := qcow2.Options{OpenBacking: func(context.Context, string, string) (qcow2.Disk, error) {
		return qcow2.OpenRaw(storagetest.NewDisk(), qcow2.RawOptions{Size: size})
	}}
	im := openDisk(t, d, o)
	want := fill(size, 1)
	if _, err := im.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := im.SetBacking(t.Context(), "new", "raw"); err != nil {
		t.Fatal(err)
	}
	checkClean(t, im, true)
	mustClose(t, im)
	im = openDisk(t, d, o)
	wantSame(t, "the disk", readAll(t, im), want)
	checkClean(t, im, true)
	mustClose(t, im)
}
