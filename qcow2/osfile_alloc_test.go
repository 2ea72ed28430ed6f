//go:build !race

package qcow2

import (
	"path/filepath"
	"testing"
)

// TestOSFileDoesNotAllocate holds the data path's promise. The race detector
// makes pools forget at random, so that it cannot be measured there.
func TestOSFileDoesNotAllocate(t *testing.T) {
	for _, direct := range []bool{false, true} {
		f := newOSFile(t, filepath.Join(t.TempDir(), "f"), FileOptions{Direct: direct})
		p := GetBuffer(16384)
		bufs := [][]byte{p[:4096], p[4096:8192], p[8192:]}
		odd := p[1:4000]
		if _, err := f.WriteAt(p, 4096); err != nil {
			t.Fatal(err)
		}
		for name, fn := range map[string]func() error{
			"WriteAt":  func() error { _, err := f.WriteAt(p, 0); return err },
			"WritevAt": func() error { _, err := f.WritevAt(bufs, 4096); return err },
			"ReadAt":   func() error { _, err := f.ReadAt(p, 0); return err },
			"Size":     func() error { _, err := f.Size(); return err },
			"bounced":  func() error { _, err := f.ReadAt(odd, 1); return err },
			"buffer":   func() error { PutBuffer(GetBuffer(70000)); return nil },
		} {
			if err := fn(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if n := testing.AllocsPerRun(100, func() { fn() }); n >= 1 {
				t.Errorf("direct %v: %s allocates %v times", direct, name, n)
			}
		}
	}
}
