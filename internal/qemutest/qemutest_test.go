package qemutest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A recorder is a testing.TB that notes failures.
type recorder struct {
	testing.TB
	failed string
}

func (r *recorder) Helper()                      {}
func (r *recorder) Errorf(f string, args ...any) { r.failed += fmt.Sprintf(f, args...) }
func (r *recorder) Fatalf(f string, args ...any) { r.Errorf(f, args...); panic(r) }
func (r *recorder) Fatal(args ...any)            { r.Errorf("%s", fmt.Sprint(args...)); panic(r) }

// fails runs f and returns what it reported; it must report something.
func fails(t *testing.T, f func(tb testing.TB)) string {
	t.Helper()
	r := &recorder{TB: t}
	func() {
		defer func() {
			if v := recover(); v != nil && v != any(r) {
				panic(v)
			}
		}()
		f(r)
	}()
	if r.failed == "" {
		t.Error("no failure reported")
	}
	return r.failed
}

func image(t *testing.T) string {
	p := filepath.Join(t.TempDir(), "a.qcow2")
	Create(t, p, 1<<20, "cluster_size=4k")
	IO(t, p, "write -P 0x5a 0 8k", "flush")
	return p
}

// poke overwrites bytes of a file.
func poke(t *testing.T, path string, off int64, b ...byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func TestCleanImagePasses(t *testing.T) {
	p := image(t)
	Check(t, p)
	if n := CheckLeaks(t, p); n != 0 {
		t.Errorf("CheckLeaks = %d", n)
	}
	if i := GetInfo(t, p); i.VirtualSize != 1<<20 || i.ClusterSize != 4096 || i.FormatSpecific.Data.RefcountBits != 16 {
		t.Errorf("GetInfo = %+v", i)
	}
	if m := Map(t, p); len(m) != 2 || m[0].Length != 8192 || !m[0].Data || m[0].Offset == nil || m[1].Data {
		t.Errorf("Map = %+v", m)
	}
	raw := filepath.Join(t.TempDir(), "raw")
	Raw(t, p, "", raw)
	Compare(t, "qcow2", p, "raw", raw)
	if Version(t) < 702 {
		t.Errorf("qemu-img is version %d, older than 7.2", Version(t))
	}
	poke(t, raw, 5, 1)
	fails(t, func(tb testing.TB) { Compare(tb, "qcow2", p, "raw", raw) })
	poke(t, raw, 5, 0x5a)
	Compare(t, "qcow2", p, "raw", raw)
	poke(t, raw, 1<<20+511, 0)
	fails(t, func(tb testing.TB) { Compare(tb, "qcow2", p, "raw", raw) })
}

func TestCorruptionAndLeaksAreFound(t *testing.T) {
	p := image(t)
	// The header names the refcount table, which names block 0; 16-bit
	// refcounts. Give one to cluster 7, which nothing uses: a leak.
	poke(t, p, 8*4096-1, 0)
	poke(t, p, 2*4096+2*7, 0, 1)
	if msg := fails(t, func(tb testing.TB) { Check(tb, p) }); !strings.Contains(msg, "1 leaks") {
		t.Errorf("Check says %q", msg)
	}
	if n := CheckLeaks(t, p); n != 1 {
		t.Errorf("CheckLeaks = %d, want 1", n)
	}
	poke(t, p, 2*4096+2*0, 0, 0) // and the header cluster is free: a corruption
	if msg := fails(t, func(tb testing.TB) { CheckLeaks(tb, p) }); !strings.Contains(msg, "1 corruptions") {
		t.Errorf("CheckLeaks says %q", msg)
	}
}

func TestFailedCommandsAreFound(t *testing.T) {
	p := image(t)
	for _, c := range []string{"write 2M 4k", "read -P 0x77 0 4k", "nonsense", "write"} {
		fails(t, func(tb testing.TB) { IO(tb, p, c) })
	}
	fails(t, func(tb testing.TB) { Img(tb, "info", p+".none") })
	os.WriteFile(p, []byte("no image"), 0o600)
	fails(t, func(tb testing.TB) { Judge(tb, p) })
}

func TestMissingToolNamesPackage(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if msg := fails(t, func(tb testing.TB) { Check(tb, "x") }); !strings.Contains(msg, Package) {
		t.Errorf("message %q does not name %s", msg, Package)
	}
}

func TestServe(t *testing.T) {
	p := image(t)
	socket := Serve(t, "qcow2", p, "-e", "2")
	IOFormat(t, "raw", "nbd+unix:///?socket="+socket, "read -P 0x5a 0 8k", "write -P 1 64k 4k", "flush")
}
