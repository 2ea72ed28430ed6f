package qcow2_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// seedFlag replays a random test; each prints its seed when it fails.
var seedFlag = flag.Uint64("seed", 0, "seed of random tests, 0 for a random one")

// scaled returns how much of n a run does by default: less with the race
// detector, which is several times slower and looks for something else.
func scaled(n int) int {
	if raceEnabled {
		return n / 4
	}
	return n
}

// newRand returns a random source whose seed is printed when the test fails.
func newRand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with: go test ./qcow2 -run '^%s$' -seed %d", t.Name(), seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// scratch returns a directory in memory, where syncs cost nothing.
func scratch(t testing.TB) string {
	t.Helper()
	return storagetest.MemoryDir(t)
}

// newCache returns a cache that is closed after everything opened later.
func newCache(t testing.TB, bytes int64) *cache.Cache {
	t.Helper()
	c, err := cache.New(cache.Options{Bytes: bytes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close the cache: %v", err)
		}
	})
	return c
}

// openBacking returns a BackingOpener for names below dir.
func openBacking(dir string, c *cache.Cache) qcow2.BackingOpener {
	return func(ctx context.Context, name, format string) (qcow2.Disk, error) {
		f, err := qcow2.OpenFile(filepath.Join(dir, name), qcow2.FileOptions{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		var d qcow2.Disk
		if format == "raw" {
			d, err = qcow2.OpenRaw(f, qcow2.RawOptions{ReadOnly: true})
		} else {
			d, err = qcow2.Open(ctx, f, qcow2.Options{ReadOnly: true, Cache: c, OpenBacking: openBacking(dir, c)})
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return d, nil
	}
}

func createEmpty(t testing.TB, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// createFile makes an image at path.
func createFile(t testing.TB, path string, size int64, o qcow2.CreateOptions) {
	t.Helper()
	createEmpty(t, path)
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow2.Create(t.Context(), f, size, o); err != nil {
		t.Fatalf("Create(%d, %+v): %v", size, o, err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// openPath opens the image at path with backing files beside it.
func openPath(t testing.TB, path string, o qcow2.Options) *qcow2.Image {
	t.Helper()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		t.Fatal(err)
	}
	if o.OpenBacking == nil {
		o.OpenBacking = openBacking(filepath.Dir(path), o.Cache)
	}
	im, err := qcow2.Open(t.Context(), f, o)
	if err != nil {
		f.Close()
		t.Fatalf("open %s: %v", path, err)
	}
	return im
}

// useFile opens the image at path; at the end of the test it is closed, if it
// is not yet, and verified.
func useFile(t testing.TB, path string, o qcow2.Options) *qcow2.Image {
	t.Helper()
	im := openPath(t, path, o)
	t.Cleanup(func() {
		if err := im.Close(); err != nil && !errors.Is(err, qcow2.ErrClosed) {
			t.Errorf("close %s: %v", path, err)
		}
		verifyFile(t, path)
	})
	return im
}

// verifyFile fails the test unless both our Check and QEMU's find the closed
// image at path without fault.
func verifyFile(t testing.TB, path string) {
	t.Helper()
	im := openPath(t, path, qcow2.Options{ReadOnly: true})
	checkClean(t, im, true)
	mustClose(t, im)
	qemutest.Check(t, path)
}

// checkClean runs Check on an open image; leaks fail the test if strict.
func checkClean(t testing.TB, im *qcow2.Image, strict bool) qcow2.CheckResult {
	t.Helper()
	var found []string
	r, err := im.Check(context.Background(), qcow2.CheckOptions{Report: func(p qcow2.Problem) {
		if len(found) < 20 {
			found = append(found, p.Msg)
		}
	}})
	if err != nil {
		t.Fatalf("Check: %v", err)
	}
	if r.Corruptions != 0 || r.CheckErrors != 0 || strict && r.Leaks != 0 {
		t.Errorf("Check: %d corruptions, %d check errors, %d leaks:\n%s", r.Corruptions, r.CheckErrors, r.Leaks, strings.Join(found, "\n"))
	}
	return r
}

func mustClose(t testing.TB, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
}

// wantErrorIs fails the test unless err is target.
func wantErrorIs(t testing.TB, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("got error %v, want %v", err, target)
	}
}

// newDisk returns a simulated host file with a new image.
func newDisk(t testing.TB, size int64, o qcow2.CreateOptions) *storagetest.Disk {
	t.Helper()
	d := storagetest.NewDisk()
	if err := qcow2.Create(t.Context(), d, size, o); err != nil {
		t.Fatalf("Create(%d, %+v): %v", size, o, err)
	}
	return d
}

// openDisk opens the image in d and does not close it.
func openDisk(t testing.TB, d *storagetest.Disk, o qcow2.Options) *qcow2.Image {
	t.Helper()
	d.Reopen()
	im, err := qcow2.Open(context.Background(), d, o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return im
}

// useDisk opens the image in d; at the end of the test it is closed, if it is
// not yet, and verified.
func useDisk(t testing.TB, d *storagetest.Disk, o qcow2.Options) *qcow2.Image {
	t.Helper()
	im := openDisk(t, d, o)
	t.Cleanup(func() {
		if err := im.Close(); err != nil && !errors.Is(err, qcow2.ErrClosed) {
			t.Errorf("Close: %v", err)
		}
		verifyDisk(t, d)
	})
	return im
}

// verifyDisk is verifyFile for an image in a simulated file without backing file.
func verifyDisk(t testing.TB, d *storagetest.Disk) {
	t.Helper()
	path := filepath.Join(scratch(t), "disk.qcow2")
	if err := d.Dump(path); err != nil {
		t.Fatal(err)
	}
	verifyFile(t, path)
	os.Remove(path)
}

// readAll returns the whole content of d.
func readAll(t testing.TB, d qcow2.Disk) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if n, err := d.ReadAt(p, 0); n != len(p) || err != nil {
		t.Fatalf("ReadAt(%d bytes, 0) = %d, %v", len(p), n, err)
	}
	return p
}

// wantSame fails the test unless got equals want.
func wantSame(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	first, n := -1, 0
	for i := range got {
		if got[i] != want[i] {
			if first < 0 {
				first = i
			}
			n++
		}
	}
	t.Fatalf("%s: %d bytes differ from %#x on: got % x, want % x", what, n, first,
		got[first:min(first+16, len(got))], want[first:min(first+16, len(want))])
}

// fill returns n bytes that seed determines, none of them 0.
func fill(n int64, seed uint64) []byte {
	p := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), byte(seed >> 32)}).Read(p)
	for i := range p {
		p[i] |= 1
	}
	return p
}

// attempt runs f with a testing.TB whose failure ends f, not t, and returns
// the failure, "" if there was none. Panics of f are failures.
func attempt(t testing.TB, f func(tb testing.TB)) (failure string) {
	a := &attemptTB{TB: t}
	run := func(f func()) {
		defer func() {
			if v := recover(); v != nil && v != any(a) {
				a.Errorf("panic: %v\n%s", v, debug.Stack())
			}
		}()
		f()
	}
	run(func() { f(a) })
	for len(a.cleanups) > 0 {
		last := len(a.cleanups) - 1
		c := a.cleanups[last]
		a.cleanups = a.cleanups[:last]
		run(c)
	}
	return a.failure
}

type attemptTB struct {
	testing.TB
	failure  string
	cleanups []func()
}

func (a *attemptTB) Helper()                      {}
func (a *attemptTB) Cleanup(f func())             { a.cleanups = append(a.cleanups, f) }
func (a *attemptTB) Failed() bool                 { return a.failure != "" }
func (a *attemptTB) Logf(string, ...any)          {}
func (a *attemptTB) Errorf(f string, args ...any) { a.failure += fmt.Sprintf(f, args...) + "\n" }
func (a *attemptTB) Error(args ...any)            { a.failure += fmt.Sprintln(args...) }
func (a *attemptTB) Fatalf(f string, args ...any) { a.Errorf(f, args...); panic(a) }
func (a *attemptTB) Fatal(args ...any)            { a.Error(args...); panic(a) }
func (a *attemptTB) FailNow()                     { a.Fatal("FailNow") }
func (a *attemptTB) TempDir() string {
	dir, err := os.MkdirTemp("", "attempt")
	if err != nil {
		a.Fatal(err)
	}
	a.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
