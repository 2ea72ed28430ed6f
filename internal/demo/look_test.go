package demo

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

func notInterrupted() error { return nil }

// TestCompareSeesEveryDifference shows that the judge of the demo can say no.
func TestCompareSeesEveryDifference(t *testing.T) {
	from := fstest.MapFS{"a": {Data: []byte("one")}, "d/b": {Data: []byte("two")}}
	for _, c := range []struct {
		name  string
		spoil func(dir string) error
		want  string
	}{
		{"nothing", func(string) error { return nil }, ""},
		{"content", func(dir string) error { return os.WriteFile(filepath.Join(dir, "d/b"), []byte("twO"), 0o600) }, "d/b differs"},
		{"missing", func(dir string) error { return os.Remove(filepath.Join(dir, "a")) }, "1 files are there, want 2"},
		{"surplus", func(dir string) error { return os.WriteFile(filepath.Join(dir, "c"), nil, 0o600) }, "c should not be there"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			sums, bytes, err := copyTree(from, dir, notInterrupted)
			if err != nil || len(sums) != 2 || bytes != 6 {
				t.Fatalf("copyTree: %d files, %d bytes, %v; want 2, 6, nil", len(sums), bytes, err)
			}
			if err := c.spoil(dir); err != nil {
				t.Fatal(err)
			}
			err = compare(dir, sums, notInterrupted)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestChangeTellsWhatIsThere(t *testing.T) {
	dir := t.TempDir()
	before, _, err := copyTree(own, dir, notInterrupted)
	if err != nil {
		t.Fatal(err)
	}
	after, changed, removed, added, err := change(dir, before)
	if err != nil {
		t.Fatal(err)
	}
	if changed == 0 || removed == 0 || added == 0 {
		t.Errorf("%d changed, %d removed, %d added; want some of each", changed, removed, added)
	}
	if err := compare(dir, after, notInterrupted); err != nil {
		t.Error(err)
	}
	if compare(dir, before, notInterrupted) == nil {
		t.Error("the tree is still as it was before")
	}
}

// TestWriterHolds shows that the check of a snapshot finds a lost commit and a
// write from the future.
func TestWriterHolds(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	w, err := startWriter(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = w.wait(t.Context(), 5)
	if end := w.end(); err != nil || end != nil {
		t.Fatal(err, end)
	}
	n := w.count()
	if err := w.holds(dir, n, n); err != nil {
		t.Errorf("whole: got %v, want nil", err)
	}
	if w.holds(dir, n, n-1) == nil {
		t.Error("a file from after the snapshot is not noticed")
	}
	if err := os.WriteFile(w.path(2), make([]byte, writerFileBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	if w.holds(dir, n, n) == nil {
		t.Error("a changed file is not noticed")
	}
	if err := os.Remove(w.path(2)); err != nil {
		t.Fatal(err)
	}
	if w.holds(dir, n, n) == nil {
		t.Error("a missing file is not noticed")
	}
}

func TestInnermost(t *testing.T) {
	for name, want := range map[string]string{
		"/pool/disk.qcow2": "/pool/disk.qcow2",
		`json:{"driver":"qcow2","force-share":true,"file":{"driver":"qcow2","file":{"driver":"file","filename":"/pool/view.qcow2"}}}`: "/pool/view.qcow2",
		`json:{"driver":"null-co"}`: `json:{"driver":"null-co"}`,
		`json:{`:                    `json:{`,
	} {
		if got := innermost(name); got != want {
			t.Errorf("innermost(%q) = %q, want %q", name, got, want)
		}
	}
}

func TestUnescape(t *testing.T) {
	for escaped, want := range map[string]string{`/a\040b`: "/a b", `/a\134b`: `/a\b`, `/a\`: `/a\`, `/a\0`: `/a\0`} {
		if got := unescape(escaped); got != want {
			t.Errorf("unescape(%q) = %q, want %q", escaped, got, want)
		}
	}
}

func TestPrinting(t *testing.T) {
	for bytes, want := range map[int64]string{0: "0 bytes", 1023: "1023 bytes", 1024: "1 KiB", 1536: "1.5 KiB", gib: "1 GiB", 196 << 10: "196 KiB"} {
		if got := size(bytes); got != want {
			t.Errorf("size(%d) = %q, want %q", bytes, got, want)
		}
	}
	for d, want := range map[time.Duration]string{1500 * time.Microsecond: "1.5 ms", 31 * time.Millisecond: "31 ms", 2500 * time.Millisecond: "2.5 s"} {
		if got := duration(d); got != want {
			t.Errorf("duration(%d) = %q, want %q", d, got, want)
		}
	}
	var out strings.Builder
	p := &printer{out: &out}
	p.begins("Do it")
	p.detail("file", "%s", "disk.qcow2")
	p.ends(false)
	want := "  1  Do it" + strings.Repeat(" ", 62) + "FAILED\n       file      disk.qcow2\n"
	if got := out.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestBuildStageRefusesWhatIsNotEmpty(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mine"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := buildStage(dir); err == nil {
		t.Error("a directory with a file in it was taken")
	}
	if _, err := openStage(dir); err == nil {
		t.Error("a directory without a marker was opened")
	}
}
