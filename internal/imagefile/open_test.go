package imagefile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/qcow2"
)

// script runs commands of QEMU in dir, one a line.
func script(t *testing.T, dir, lines string) {
	t.Helper()
	for line := range strings.Lines(lines) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		cmd := exec.Command("sh", "-c", line)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s (install %s)", line, err, out, qemutest.Package)
		}
	}
}

// open opens name and closes it at the end of the test.
func open(t *testing.T, name string, o Options) (qcow2.Disk, Info) {
	t.Helper()
	d, info, err := Open(t.Context(), name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, info
}

// wantBytes demands that [off, off+n) of d consists of b.
func wantBytes(t *testing.T, d qcow2.Disk, off, n int64, b byte) {
	t.Helper()
	p := make([]byte, n)
	if _, err := d.ReadAt(p, off); err != nil {
		t.Errorf("ReadAt(%d bytes, %#x): %v", n, off, err)
	} else if !bytes.Equal(p, bytes.Repeat([]byte{b}, int(n))) {
		t.Errorf("ReadAt(%d bytes, %#x) is not all %d", n, off, b)
	}
}

// TestOpenChain opens a chain whose names are relative to different
// directories, from a working directory of its own.
func TestOpenChain(t *testing.T) {
	dir := t.TempDir()
	script(t, dir, `
		mkdir a b
		qemu-img create -q -f raw a/base.raw 4M
		qemu-io -f raw -c 'write -P 1 0 4M' a/base.raw
		qemu-img create -q -f qcow2 -b base.raw -F raw a/mid.qcow2
		qemu-io -c 'write -P 2 1M 1M' a/mid.qcow2
		qemu-img create -q -f qcow2 -b ../a/mid.qcow2 -F qcow2 b/top.qcow2 6M
		qemu-io -c 'write -P 3 2M 1M' b/top.qcow2
	`)
	top := filepath.Join(dir, "b", "top.qcow2")
	for _, name := range []string{
		top, "file:" + top,
		fmt.Sprintf(`json:{"driver":"qcow2","file":{"driver":"file","filename":%q}}`, top),
		fmt.Sprintf(`json:{"file.filename":%q}`, top),
		fmt.Sprintf(`json:{"driver":"qcow2","file.driver":"file","file.filename":%q,"read-only":"on"}`, top),
	} {
		d, info := open(t, name, Options{ReadOnly: true})
		if info.Format != "qcow2" || d.Size() != 6<<20 {
			t.Errorf("%s: format %q, %d bytes", name, info.Format, d.Size())
		}
		wantBytes(t, d, 0, 1<<20, 1)
		wantBytes(t, d, 1<<20, 1<<20, 2)
		wantBytes(t, d, 2<<20, 1<<20, 3)
		wantBytes(t, d, 3<<20, 1<<20, 1)
		wantBytes(t, d, 4<<20, 2<<20, 0)
	}
	// Without the chain only what the top holds can be read.
	d, _ := open(t, top, Options{ReadOnly: true, NoBacking: true})
	wantBytes(t, d, 2<<20, 1<<20, 3)
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrNotOpened) {
		t.Errorf("read of what the absent backing file holds: %v, want ErrNotOpened", err)
	}
	// The backing of the JSON name wins over that of the header.
	d, _ = open(t, fmt.Sprintf(`json:{"driver":"qcow2","file":{"driver":"file","filename":%q},"backing":null}`, top), Options{ReadOnly: true, Format: "qcow2"})
	if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, ErrNotOpened) {
		t.Errorf("read with backing null: %v, want ErrNotOpened", err)
	}
}

// TestOpenHeaderOverlay opens a clone of an internal snapshot through a header
// overlay while another process would write the source, and compares with QEMU.
func TestOpenHeaderOverlay(t *testing.T) {
	dir := t.TempDir()
	script(t, dir, `
		qemu-img create -q -f qcow2 A.qcow2 8M
		qemu-io -c 'write -P 1 0 2M' -c 'write -P 2 5M 100k' A.qcow2
		qemu-img snapshot -c s1 A.qcow2
		qemu-io -c 'write -P 9 0 8M' A.qcow2
		qemu-img create -q -f qcow2 -b $PWD/A.qcow2 -F raw H.qcow2 64T
	`)
	a := filepath.Join(dir, "A.qcow2")
	im, _, err := Open(t.Context(), a, Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	l1, entries, err := im.(*qcow2.Image).L1TableOf("s1")
	if err := errors.Join(err, im.Close()); err != nil {
		t.Fatal(err)
	}
	// Guest cluster 0 of H is the header cluster of A with the L1 table of s1.
	header, err := os.ReadFile(a)
	if err != nil {
		t.Fatal(err)
	}
	header = header[:65536]
	put := func(off int, n int, v uint64) {
		for i := range n {
			header[off+i] = byte(v >> (8 * (n - 1 - i)))
		}
	}
	put(36, 4, uint64(entries))
	put(40, 8, uint64(l1))
	put(60, 4, 0)
	put(64, 8, 0)
	patch := filepath.Join(dir, "patch")
	if err := os.WriteFile(patch, header, 0o600); err != nil {
		t.Fatal(err)
	}
	script(t, dir, `
		qemu-io -c 'write -s patch 0 64k' H.qcow2
		qemu-img create -q -f qcow2 -u -F qcow2 -b 'json:{"driver":"qcow2","force-share":true,"file":{"driver":"qcow2","file":{"driver":"file","filename":"'$PWD'/H.qcow2"}}}' C.qcow2 8M
		qemu-io -c 'write -P 3 1M 64k' C.qcow2
		qemu-img convert -O raw C.qcow2 want.raw
	`)
	writer, _ := open(t, a, Options{}) // as a volume in use
	if err := writer.Discard(0, 1<<20); err != nil {
		t.Fatal(err)
	}
	c, _ := open(t, filepath.Join(dir, "C.qcow2"), Options{})
	want, err := os.ReadFile(filepath.Join(dir, "want.raw"))
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, c.Size())
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the clone differs from what QEMU reads (%v)", err)
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	script(t, dir, `
		qemu-img create -q -f qcow2 ok.qcow2 1M
		qemu-img create -q -f qcow2 -u -b none.qcow2 -F qcow2 orphan.qcow2 1M
		qemu-img create -q -f qcow2 -u -b ok.qcow2 -F vmdk format.qcow2 1M
		qemu-img create -q -f qcow2 -u -b nbd:localhost:1 -F raw proto.qcow2 1M 2>&1 || true
		qemu-img create -q -f qcow2 -u -b loop2.qcow2 -F qcow2 loop1.qcow2 1M
		qemu-img create -q -f qcow2 -u -b ./loop1.qcow2 -F qcow2 loop2.qcow2 1M
		qemu-img create -q -f qcow2 -u -b self.qcow2 -F qcow2 self.qcow2.new 1M && mv self.qcow2.new self.qcow2
		qemu-img create -q -f raw raw.img 1M
		printf KDMV0000000000000000 > vmdk.img
		mkfifo fifo
	`)
	t.Chdir(dir)
	for _, tt := range []struct {
		name string
		o    Options
		want error  // nil: see text
		text string // part of the message
	}{
		{"none", Options{}, os.ErrNotExist, "none"},
		{"orphan.qcow2", Options{}, os.ErrNotExist, "none.qcow2"},
		{"loop1.qcow2", Options{ReadOnly: true}, ErrChain, "comes back"},
		{"loop1.qcow2", Options{}, ErrChain, "comes back"},
		{"self.qcow2", Options{ReadOnly: true}, ErrChain, "comes back"},
		{"format.qcow2", Options{}, nil, `"vmdk"`},
		{"proto.qcow2", Options{}, nil, `"nbd"`},
		{"raw.img", Options{Format: "qcow2"}, qcow2.ErrNotQcow2, ""},
		{"raw.img", Options{Format: "qed"}, nil, `"qed"`},
		{"raw.img", Options{ReadOnly: true, Snapshot: "x"}, ErrNoSnapshots, ""},
		{"ok.qcow2", Options{ReadOnly: true, Snapshot: "x"}, qcow2.ErrSnapshotNotFound, ""},
		{"ok.qcow2", Options{Snapshot: "x"}, nil, "read-only"},
		{"ok.qcow2", Options{ForceShare: true}, nil, "read-only"},
		{"vmdk.img", Options{ReadOnly: true}, nil, `"vmdk"`},
		{"fifo", Options{ReadOnly: true}, nil, "not a regular file"},
		{dir, Options{ReadOnly: true}, nil, "is a directory"},
		{"nbd://host/x", Options{}, nil, `"nbd"`},
		{`json:{"driver":"qcow2"`, Options{}, nil, "EOF"},
		{`json:{"driver":"qcow2"} x`, Options{}, nil, "text after"},
		{`json:{"driver":"qcow2"}`, Options{}, nil, `"file"`},
		{`json:{"driver":"qcow2","filename":"ok.qcow2"}`, Options{}, nil, `"filename"`},
		{`json:{"driver":"qcow2","file":{"driver":"file"}}`, Options{}, nil, "needs a filename"},
		{`json:{"driver":"qcow2","file":"node0"}`, Options{}, nil, "must be an object"},
		{`json:{"driver":7}`, Options{}, nil, "must be a string"},
		{`json:{"driver":"qcow2","lazy-refcounts":true,"file.filename":"ok.qcow2"}`, Options{}, nil, `"lazy-refcounts" is not supported`},
		{`json:{"driver":"raw","size":-1,"file.filename":"raw.img"}`, Options{}, nil, "size in bytes"},
		{`json:{"driver":"raw","read-only":"maybe","file.filename":"raw.img"}`, Options{}, nil, "boolean"},
		{`json:{"driver":"qcow2","file":{"driver":"qcow2","file":{"driver":"file","filename":"ok.qcow2"}}}`, Options{}, nil, "only be opened read-only"},
	} {
		d, _, err := Open(t.Context(), tt.name, tt.o)
		if err == nil {
			d.Close()
			t.Errorf("%s: opened", tt.name)
			continue
		}
		if tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v; want %v, with %q", tt.name, err, tt.want, tt.text)
		}
	}
	// Nothing may stay locked.
	for _, name := range []string{"ok.qcow2", "orphan.qcow2", "loop1.qcow2", "raw.img"} {
		script(t, dir, "qemu-img rebase -u -b '' "+name+" 2>/dev/null || qemu-img resize -f raw "+name+" 1M")
	}
}

// TestOpenLongChain opens the longest chain that is allowed, and one more.
func TestOpenLongChain(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	for i := range maxDepth + 2 {
		o := qcow2.CreateOptions{ClusterSize: 512}
		if i > 0 {
			o.BackingFile, o.BackingFormat = name(i-1), "qcow2"
		}
		if err := os.WriteFile(name(i), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := qcow2.OpenFile(name(i), qcow2.FileOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(qcow2.Create(t.Context(), f, 1<<20, o), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	d, _ := open(t, name(maxDepth), Options{ReadOnly: true})
	wantBytes(t, d, 0, 1<<20, 0)
	if d, _, err := Open(t.Context(), name(maxDepth+1), Options{ReadOnly: true}); !errors.Is(err, ErrChain) {
		if err == nil {
			d.Close()
		}
		t.Errorf("a longer chain: %v, want ErrChain", err)
	}
}

// TestLocks opens a chain in each way and starts QEMU's tools on its files.
func TestLocks(t *testing.T) {
	dir := t.TempDir()
	script(t, dir, `
		qemu-img create -q -f qcow2 base.qcow2 1M
		qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
		qemu-img create -q -f raw raw.img 1M
	`)
	t.Chdir(dir)
	for _, tt := range []struct {
		name    string
		o       Options
		command string
		refused string
	}{
		{"top.qcow2", Options{}, "qemu-img info top.qcow2", `shared "write" lock`},
		{"top.qcow2", Options{}, "qemu-img info -U top.qcow2", ""},
		{"top.qcow2", Options{}, "qemu-img info base.qcow2", ""},
		{"top.qcow2", Options{}, "qemu-img resize base.qcow2 2M", `"write" lock`},
		{"top.qcow2", Options{ReadOnly: true}, "qemu-img info top.qcow2", ""},
		{"top.qcow2", Options{ReadOnly: true}, "qemu-img resize top.qcow2 2M", `"write" lock`},
		{"top.qcow2", Options{ReadOnly: true, ForceShare: true}, "qemu-img resize top.qcow2 2M", ""},
		{"top.qcow2", Options{ReadOnly: true, ForceShare: true}, "qemu-img resize base.qcow2 2M", ""},
		{"raw.img", Options{ReadOnly: true, Format: "raw"}, "qemu-img resize -f raw raw.img 2M", ""},
		{"raw.img", Options{ReadOnly: true}, "qemu-img resize -f raw raw.img 3M", ""},
		{"raw.img", Options{ReadOnly: true, NoWriters: true}, "qemu-img resize -f raw raw.img 4M", `"write" lock`},
		{"raw.img", Options{ReadOnly: true, NoWriters: true, ForceShare: true}, "qemu-img resize -f raw raw.img 4M", ""},
	} {
		d, _, err := Open(t.Context(), tt.name, tt.o)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sh", "-c", tt.command).CombinedOutput()
		if (err != nil) != (tt.refused != "") || !strings.Contains(string(out), tt.refused) {
			t.Errorf("%s open with %+v: %s: %v, %s; want refused by %q", tt.name, tt.o, tt.command, err, out, tt.refused)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	open(t, "top.qcow2", Options{})
	if _, _, err := Open(t.Context(), "top.qcow2", Options{ReadOnly: true}); !errors.Is(err, qcow2.ErrLocked) {
		t.Errorf("second open: %v, want ErrLocked", err)
	}
}

// TestProbedRaw writes what looks like another format to a raw disk that was probed.
func TestProbedRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d, info := open(t, path, Options{})
	if !info.Probed || info.Format != "raw" {
		t.Fatalf("opened as %+v", info)
	}
	header := []byte("QFI\xfb\x00\x00\x00\x03 and more")
	for _, tt := range []struct {
		off  int64
		p    []byte
		want error
	}{
		{0, header, ErrProbedHeader},
		{0, append(header, make([]byte, 70000)...), ErrProbedHeader},
		{1 << 10, header, nil},
		{0, []byte("QFI\xfb"), nil}, // no version yet
		{4, []byte("\x00\x00\x00\x02"), ErrProbedHeader},
		{0, []byte("KDMV"), ErrProbedHeader},
		{0, []byte("text"), nil},
		{0x40, []byte("\x7f\x10\xda\xbe"), ErrProbedHeader},
	} {
		if _, err := d.WriteAt(tt.p, tt.off); !errors.Is(err, tt.want) {
			t.Errorf("WriteAt(%q…, %d): %v, want %v", tt.p[:4], tt.off, err, tt.want)
		}
	}
	raw, _ := open(t, path, Options{Format: "raw", ReadOnly: true})
	wantBytes(t, raw, 4, 4, 0)
}

// TestCacheModes writes through each cache mode.
func TestCacheModes(t *testing.T) {
	for _, mode := range []CacheMode{"", CacheWriteback, CacheNone, CacheWritethrough, CacheDirectsync, CacheUnsafe} {
		for _, format := range []string{"qcow2", "raw"} {
			dir := t.TempDir()
			script(t, dir, "qemu-img create -q -f "+format+" disk 4M")
			path := filepath.Join(dir, "disk")
			d, _, err := Open(t.Context(), path, Options{Format: format, CacheMode: mode, Discard: true})
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, d.Size())
			rng := rand.New(rand.NewPCG(1, 1))
			for range 50 {
				off, n := rng.Int64N(d.Size()), 1+rng.Int64N(30000)
				n = min(n, d.Size()-off)
				if rng.IntN(4) == 0 {
					if err := d.WriteZeroes(off, n, true); err != nil {
						t.Fatal(err)
					}
					clear(want[off : off+n])
					continue
				}
				p := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, int(n))
				if _, err := d.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
				copy(want[off:], p)
			}
			if err := errors.Join(d.Flush(), d.Close()); err != nil {
				t.Fatal(err)
			}
			script(t, dir, "qemu-img convert -f "+format+" -O raw disk out")
			got, err := os.ReadFile(filepath.Join(dir, "out"))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s, cache mode %q: wrong content (%v)", format, mode, err)
			}
		}
	}
}

func TestFullBackingName(t *testing.T) {
	for _, tt := range []struct{ name, backing, want string }{
		{"a.qcow2", "b.qcow2", "b.qcow2"},
		{"dir/a.qcow2", "b.qcow2", "dir/b.qcow2"},
		{"/x/a.qcow2", "../b.qcow2", "/x/../b.qcow2"},
		{"file:dir/a.qcow2", "b", "dir/b"},
		{"dir/a.qcow2", "/abs/b", "/abs/b"},
		{"dir/a.qcow2", "json:{}", "json:{}"},
		{"dir/a.qcow2", "nbd:host:1", "nbd:host:1"},
		{"dir/a.qcow2", "", ""},
		{"json:{}", "/abs", "/abs"},
	} {
		if got, err := FullBackingName(tt.name, tt.backing); err != nil || got != tt.want {
			t.Errorf("FullBackingName(%q, %q) = %q, %v; want %q", tt.name, tt.backing, got, err, tt.want)
		}
	}
	if _, err := FullBackingName("json:{}", "b"); err == nil {
		t.Error("a relative name has no directory in JSON")
	}
}

// TestDiskFile reads at the end of an image that serves as a file.
func TestDiskFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, bytes.Repeat([]byte{1}, 1024), 0o600); err != nil {
		t.Fatal(err)
	}
	d, _ := open(t, path, Options{Format: "raw", ReadOnly: true})
	f := &diskFile{disk: d}
	for _, tt := range []struct {
		off, n int64
		want   int
		err    error
	}{
		{0, 1024, 1024, nil}, {1000, 100, 24, io.EOF}, {1024, 1, 0, io.EOF}, {5000, 10, 0, io.EOF},
	} {
		if n, err := f.ReadAt(make([]byte, tt.n), tt.off); n != tt.want || err != tt.err {
			t.Errorf("ReadAt(%d bytes, %d) = %d, %v; want %d, %v", tt.n, tt.off, n, err, tt.want, tt.err)
		}
	}
}

// FuzzParseName demands that no name makes the parser panic.
func FuzzParseName(f *testing.F) {
	for _, s := range []string{"a", "file:a", "json:{}", `json:{"file.filename":"x","file":{"driver":"file"}}`, `json:{"a.b.c":1,"a":null}`, "nbd:x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseName(s)
		if (n == nil) == (err == nil) {
			t.Errorf("parseName(%q) = %v, %v", s, n, err)
		}
		if n != nil {
			HostPath(s)
			n.backingNode("b", "raw")
		}
	})
}
