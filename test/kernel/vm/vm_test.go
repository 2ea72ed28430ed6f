package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestArchive unpacks with another program what the writer has written.
func TestArchive(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	if err := os.WriteFile(source, []byte("12345"), 0o750); err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "archive")
	f, err := os.Create(archive)
	if err != nil {
		t.Fatal(err)
	}
	c := &cpioWriter{w: f}
	c.text("a/b/text", 0o644, "content\n")
	c.file("a/copy", source)
	c.symlink("link", "a/copy")
	c.text("empty", 0o600, "")
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if c.n%4 != 0 {
		t.Errorf("archive of %d bytes: another one behind it would not be found", c.n)
	}
	cmd := exec.Command("busybox", "cpio", "-id", "-F", archive)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s(apt-get install busybox-static)", err, out)
	}
	for name, want := range map[string]string{"a/b/text": "content\n", "a/copy": "12345", "link": "12345", "empty": ""} {
		if got, err := os.ReadFile(filepath.Join(cmd.Dir, name)); string(got) != want || err != nil {
			t.Errorf("%s: %q, %v; want %q", name, got, err, want)
		}
	}
	if fi, err := os.Stat(filepath.Join(cmd.Dir, "a/copy")); err != nil || fi.Mode().Perm() != 0o750 {
		t.Errorf("a/copy: %v, %v; want mode 0750", fi.Mode(), err)
	}
}

// TestArchiveOfMissingFile checks that a file that cannot be read is an error of the whole archive.
func TestArchiveOfMissingFile(t *testing.T) {
	c := &cpioWriter{w: &strings.Builder{}}
	c.file("x", filepath.Join(t.TempDir(), "missing"))
	if err := c.end(); err == nil {
		t.Error("no error")
	}
}

func TestModuleOrder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("modules.dep", "fs/top.ko: lib/middle.ko lib/bottom.ko\nlib/middle.ko: lib/bottom.ko\nlib/bottom.ko:\n")
	write("modules.builtin", "kernel/fs/inside.ko\n")
	k := &Kernel{Release: "1", modules: dir}
	got, err := k.moduleFiles([]string{"middle", "inside", "top"})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, path := range got {
		names = append(names, filepath.Base(path))
	}
	if want := []string{"bottom.ko", "middle.ko", "top.ko"}; !slices.Equal(names, want) {
		t.Errorf("order %v, want %v", names, want)
	}
	if _, err := k.moduleFiles([]string{"nowhere"}); err == nil || !strings.Contains(err.Error(), "no module nowhere") {
		t.Errorf("unknown module: %v", err)
	}
}

func TestTrouble(t *testing.T) {
	r := Result{Kernel: []string{
		"[    0.1] Kernel command line: console=ttyS0",
		"[    1.0] EXT4-fs (nbd0): mounted filesystem with ordered data mode.",
		"[    2.0] I/O error, dev nbd0, sector 8 op 0x1:(WRITE)",
		"[    2.1] Buffer I/O error on dev nbd0, logical block 1, lost async page write",
		"[    2.2] EXT4-fs (nbd0): Remounting filesystem read-only",
		"[    2.3] XFS (nbd1): log I/O error -5",
		"[    3.0] INFO: task fio:77 blocked for more than 20 seconds.",
		"[    4.0] BUG: kernel NULL pointer dereference",
		"[    5.0] WARNING: CPU: 0 PID: 1 at block/bdev.c:1",
		"[    6.0] block nbd0: Receive control failed (result -32)",
	}}
	if got := len(r.Trouble(nil)); got != 7 {
		t.Errorf("%d lines of trouble, want 7: %q", got, r.Trouble(nil))
	}
	if got := len(r.Trouble(regexp.MustCompile("dev nbd0"))); got != 5 {
		t.Errorf("%d lines of trouble with two allowed, want 5", got)
	}
}

func TestQuote(t *testing.T) {
	const word = `it's "$HOME" \ and more`
	out, err := exec.Command("sh", "-c", "printf %s "+quote(word)).Output()
	if string(out) != word || err != nil {
		t.Errorf("%q, %v; want %q", out, err, word)
	}
}
