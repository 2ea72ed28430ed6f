package qcow2

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"csi-qcow2/internal/storagetest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden returns the images of testdata, whose README has their commands.
func golden(t testing.TB) []string {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.qcow2")
	if err != nil || len(paths) < 8 {
		t.Fatalf("testdata: %d images (%v)", len(paths), err)
	}
	return paths
}

func loadDisk(t testing.TB, path string) *storagetest.Disk {
	t.Helper()
	d, err := storagetest.LoadDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestGoldenDump(t *testing.T) {
	for _, path := range golden(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			var got bytes.Buffer
			if err := Dump(t.Context(), &got, loadDisk(t, path)); err != nil {
				t.Fatal(err)
			}
			name := path[:len(path)-len(".qcow2")] + ".dump"
			if *update {
				if err := os.WriteFile(name, got.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("got\n%s\nwant\n%s", got.Bytes(), want)
			}
		})
	}
}

// TestGoldenEncode: what is decoded from QEMU's header cluster and snapshot
// table is encoded to the same bytes.
func TestGoldenEncode(t *testing.T) {
	for _, path := range golden(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			d := loadDisk(t, path)
			h, err := readHeader(d)
			if err != nil {
				t.Fatal(err)
			}
			if err := validateTables(d, h); err != nil {
				t.Error(err)
			}
			got, err := h.encodeCluster()
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, len(got))
			if err := readZeroed(d, want, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("header cluster\ngot  %x\nwant %x", got, want)
			}
			records, n, err := readSnapshotTableSize(d, h)
			if err != nil {
				t.Fatal(err)
			}
			table := encodeSnapshotTable(records)
			want = make([]byte, n)
			if err := readZeroed(d, want, h.snapshotsOffset); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(table, want) {
				t.Errorf("snapshot table\ngot  %x\nwant %x", table, want)
			}
		})
	}
}
