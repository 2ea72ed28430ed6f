package durable

import (
	"os"
	"path/filepath"
	"testing"
)

// TestOpenScratch checks that a scratch file can be written and read, and leaves nothing.
func TestOpenScratch(t *testing.T) {
	d := openTestDir(t)
	if err := d.Mkdir("incoming"); err != nil {
		t.Fatal(err)
	}
	f, err := d.OpenScratch("incoming")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("some"); err != nil {
		t.Error(err)
	}
	b := make([]byte, 4)
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != "some" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Join(d.Path(), "incoming")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	if _, err := d.OpenScratch("absent"); !os.IsNotExist(err) {
		t.Errorf("in a directory that is not there: %v, want that it does not exist", err)
	}
}
