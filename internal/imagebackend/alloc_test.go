package imagebackend_test

import (
	"testing"

	"csi-qcow2/internal/imagebackend"
)

// TestRequestsAllocateNothing checks the path from a request to the host file:
// reads and writes in place.
func TestRequestsAllocateNothing(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		b := imagebackend.New(newImage(t, imageKind{format: format}, "16M"), imagebackend.Options{})
		p := make([]byte, 4096)
		for off := int64(0); off < 1<<20; off += 4096 {
			if _, err := b.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		}
		off := int64(0)
		for what, do := range map[string]func() (int, error){
			"read":  func() (int, error) { return b.ReadAt(p, off) },
			"write": func() (int, error) { return b.WriteAt(p, off) },
		} {
			n := testing.AllocsPerRun(1000, func() {
				off = (off + 4096) % (1 << 20)
				if _, err := do(); err != nil {
					t.Fatal(err)
				}
			})
			if n != 0 {
				t.Errorf("%s: %v allocations for each %s: want 0", format, n, what)
			}
		}
	}
}
