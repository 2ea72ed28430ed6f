package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

type sample struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

func openTestDir(t *testing.T) *Dir {
	t.Helper()
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestRecordRoundTrip(t *testing.T) {
	d := openTestDir(t)
	want := sample{"a <b> & \u2028", 1 << 40}
	if err := WriteRecord(d, "r.json", "sample", 1, want); err != nil {
		t.Fatal(err)
	}
	var got sample
	if err := ReadRecord(d, "r.json", "sample", 1, &got); err != nil {
		t.Fatal(err)
	}
	if got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
}

// TestRecordRefusesDamage flips every bit of a record in turn.
func TestRecordRefusesDamage(t *testing.T) {
	good, err := EncodeRecord("sample", 1, sample{"volume", 4096})
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(good) - 1 { // the last byte is the newline
		for bit := range 8 {
			bad := append([]byte(nil), good...)
			bad[i] ^= 1 << bit
			var got sample
			// JSON field names match without regard to case: that damage is harmless.
			if err := DecodeRecord(bad, "sample", 1, &got); err == nil && got != (sample{"volume", 4096}) {
				t.Fatalf("bit %d of byte %d flipped: decoded %+v from %s", bit, i, got, bad)
			} else if err != nil && !errors.Is(err, ErrDamaged) {
				t.Fatalf("byte %d: %v is not ErrDamaged", i, err)
			}
		}
	}
	for n := range len(good) - 1 {
		if err := DecodeRecord(good[:n], "sample", 1, new(sample)); !errors.Is(err, ErrDamaged) {
			t.Fatalf("cut to %d bytes: got %v", n, err)
		}
	}
	newer, err := EncodeRecord("sample", 2, sample{})
	if err != nil {
		t.Fatal(err)
	}
	if err := DecodeRecord(newer, "sample", 1, new(sample)); !errors.Is(err, ErrDamaged) {
		t.Fatalf("newer version: got %v", err)
	}
}

func TestDirStaysBeneath(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := openTestDir(t)
	if err := os.Symlink(outside, filepath.Join(d.Path(), "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, "secret"), filepath.Join(d.Path(), "file")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link/secret", "file", "../x", "/etc/passwd", "a/../../x", "", "link/new"} {
		if _, err := d.ReadFile(name); err == nil {
			t.Errorf("ReadFile(%q) succeeded", name)
		}
		if err := d.WriteFile(name, []byte("y")); err == nil && name != "file" {
			t.Errorf("WriteFile(%q) succeeded", name)
		}
		if err := d.Mkdir(name); err == nil && name != "file" {
			t.Errorf("Mkdir(%q) succeeded", name)
		}
	}
	// Writing over a link replaces the link, removing removes the link.
	if got, err := os.ReadFile(filepath.Join(outside, "secret")); err != nil || string(got) != "x" {
		t.Fatalf("the file behind the link changed: %q, %v", got, err)
	}
	if err := d.RemoveAll("link"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(outside, "secret")); err != nil {
		t.Fatalf("RemoveAll went through the link: %v", err)
	}
}

// TestWriteFileKilledAtEachStep stops a replace before and after the change.
func TestWriteFileKilledAtEachStep(t *testing.T) {
	errKilled := errors.New("killed")
	for kill := range 2 {
		d := openTestDir(t)
		if err := d.WriteFile("f", []byte("old")); err != nil {
			t.Fatal(err)
		}
		n := 0
		d.SetStep(func(string) error {
			n++
			if n > kill {
				return errKilled
			}
			return nil
		})
		if err := d.WriteFile("f", []byte("new")); !errors.Is(err, errKilled) {
			t.Fatalf("kill %d: got %v", kill, err)
		}
		got, err := d.ReadFile("f")
		if want := []string{"old", "new"}[kill]; err != nil || string(got) != want {
			t.Fatalf("kill %d: got %q, %v, want %q", kill, got, err, want)
		}
	}
}

func TestRenameDoesNotReplace(t *testing.T) {
	d := openTestDir(t)
	for _, name := range []string{"a", "b"} {
		if err := d.Mkdir(name); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Rename("a", "b"); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("got %v, want ErrExist", err)
	}
	if err := d.Rename("a", "c"); err != nil {
		t.Fatal(err)
	}
	names, err := d.List(".")
	if err != nil || len(names) != 2 {
		t.Fatalf("got %v, %v", names, err)
	}
}

// TestRemoveAllBesideACreator checks that what it calls removed is, even when somebody makes
// files in it meanwhile.
func TestRemoveAllBesideACreator(t *testing.T) {
	d := openTestDir(t)
	for range 50 {
		if err := d.Mkdir("t"); err != nil && !errors.Is(err, fs.ErrExist) {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { // ends with the directory, or after some files
			defer close(done)
			for n := 0; n < 200 && os.WriteFile(filepath.Join(d.Path(), "t", fmt.Sprint(n)), nil, 0o600) == nil; n++ {
			}
		}()
		err := d.RemoveAll("t") // refuses while files come
		_, there := os.Lstat(filepath.Join(d.Path(), "t"))
		if err == nil && there == nil {
			t.Fatal("a directory that is there was called removed")
		}
		<-done
		if err := d.RemoveAll("t"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRemoveTemporaryAndTree(t *testing.T) {
	d := openTestDir(t)
	if err := d.Mkdir("t"); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := d.Mkdir(fmt.Sprintf("t/%d", i)); err != nil {
			t.Fatal(err)
		}
		if err := d.WriteFile(fmt.Sprintf("t/%d/f", i), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".f.tmp", ".nfs000000000000000a00000001", "t/.nfs000000000000000b00000002"} {
		if err := os.WriteFile(filepath.Join(d.Path(), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := d.List("."); err != nil || strings.Join(names, " ") != "t" {
		t.Fatalf("got %v, %v", names, err)
	}
	if err := d.RemoveTemporary("."); err != nil {
		t.Fatal(err)
	}
	if err := d.RemoveAll("t"); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(d.Path())
	if err != nil || len(left) != 0 {
		t.Fatalf("left %v, %v", left, err)
	}
}

func TestReadFileRefusesOddFiles(t *testing.T) {
	d := openTestDir(t)
	if err := os.WriteFile(filepath.Join(d.Path(), "big"), make([]byte, maxFileBytes+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Mkdir("dir"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"big", "dir", "absent"} {
		if _, err := d.ReadFile(name); err == nil {
			t.Errorf("ReadFile(%q) succeeded", name)
		}
	}
}

func TestReplace(t *testing.T) {
	d := openTestDir(t)
	for _, name := range []string{"a", "b"} {
		if err := d.WriteFile(name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Replace("a", "b"); err != nil {
		t.Fatal(err)
	}
	got, err := d.ReadFile("b")
	if left, listErr := d.List("."); err != nil || string(got) != "a" || listErr != nil || len(left) != 1 {
		t.Errorf("got %q, %v, and %q, %v", got, err, left, listErr)
	}
}
