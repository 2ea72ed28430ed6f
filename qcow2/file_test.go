package qcow2_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// TestFileOfHost holds the files of the operating system to the contract of
// File that the simulated ones keep, too.
func TestFileOfHost(t *testing.T) {
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprintf("direct=%t", direct), func(t *testing.T) {
			storagetest.TestFile(t, func(t *testing.T) storagetest.File {
				path := filepath.Join(t.TempDir(), "file")
				createEmpty(t, path)
				f, err := qcow2.OpenFile(path, qcow2.FileOptions{Direct: direct})
				if err != nil {
					t.Fatal(err)
				}
				return f
			})
		})
	}
}
