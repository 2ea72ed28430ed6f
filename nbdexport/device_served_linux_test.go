package nbdexport

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"csi-qcow2/internal/durable"
)

// TestServedSurvivesTheProcess: a later process knows how long ago a device was served, and assumes the
// worst of what it knows nothing about.
func TestServedSurvivesTheProcess(t *testing.T) {
	path := t.TempDir()
	dir, err := durable.OpenDir(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	open := func() *served {
		t.Helper()
		s, err := openServed(dir)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	check := func(s *served, backend string, least, most time.Duration) {
		t.Helper()
		if left, err := s.left(backend); err != nil || left < least || left > most {
			t.Errorf("%s: %s left, %v; want %s to %s", backend, left, err, least, most)
		}
	}
	first := open()
	check(first, "a", 0, 0)
	if err := first.note(time.Hour, "a", "b"); err != nil {
		t.Fatal(err)
	}
	if err := first.note(time.Nanosecond, "c"); err != nil {
		t.Fatal(err)
	}
	if err := first.forget("b"); err != nil {
		t.Fatal(err)
	}
	second := open()
	check(second, "a", time.Minute, time.Hour)
	check(second, "b", 0, 0)
	check(second, "c", 0, 0)

	second.rec.BootID = "another"
	if err := second.note(time.Hour, "a"); err != nil {
		t.Fatal(err)
	}
	check(open(), "a", 0, 0)

	if err := first.note(time.Hour, "a"); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(path, servedName)
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	check(open(), "a", 0, 0)
}
