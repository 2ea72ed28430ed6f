package nbdtest_test

import (
	"path/filepath"
	"testing"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

func TestMemoryConforms(t *testing.T) {
	nbdtest.TestBackend(t, func(*testing.T) nbdexport.Backend { return nbdtest.NewMemory(5 << 20) })
}

func TestFileBackendConforms(t *testing.T) {
	nbdtest.TestBackend(t, func(t *testing.T) nbdexport.Backend {
		b, err := nbdtest.NewFileBackend(filepath.Join(t.TempDir(), "disk"), 5<<20)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return b
	})
}
