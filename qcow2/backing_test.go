package qcow2_test

import (
	"context"
	"testing"

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
