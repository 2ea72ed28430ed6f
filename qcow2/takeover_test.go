package qcow2_test

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A served is an image in a simulated file, open in a process with an arena.
type served struct {
	t     *testing.T
	arena string
	cache *cache.Cache
	disk  *storagetest.Disk
	im    *qcow2.Image
	err   error // of Open
}

var servedID = [16]byte{7, 15: 7}

func serve(t *testing.T, disk *storagetest.Disk, arena string) *served {
	t.Helper()
	c, err := cache.New(cache.Options{Bytes: 32 << 10, Path: arena})
	if err != nil {
		t.Fatal(err)
	}
	s := &served{t: t, arena: arena, cache: c, disk: disk}
	s.im, s.err = qcow2.Open(t.Context(), disk, qcow2.Options{Cache: c, ID: servedID, Unclean: true})
	t.Cleanup(func() {
		if s.im != nil {
			_ = s.im.Close()
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// killed returns what a SIGKILL leaves of the file and of the arena.
func (s *served) killed() (*storagetest.Disk, string) {
	s.t.Helper()
	mem, err := os.ReadFile(s.arena)
	if err != nil {
		s.t.Fatal(err)
	}
	arena := filepath.Join(s.t.TempDir(), "arena")
	if err := os.WriteFile(arena, mem, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return s.disk.Clone(), arena
}

func (s *served) write(data []byte, off int64) {
	s.t.Helper()
	if _, err := s.im.WriteAt(data, off); err != nil {
		s.t.Fatal(err)
	}
}

// TestFailureOutlivesTheProcess kills the process after a failed sync, before
// the client may have heard of it: its FLUSH, repeated, must not succeed in any
// successor (P6) until the image was closed, and what was flushed is there then (P2).
func TestFailureOutlivesTheProcess(t *testing.T) {
	for name, o := range map[string]qcow2.CreateOptions{"512": {ClusterSize: 512}, "4k": {ClusterSize: 4 << 10}} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, newDisk(t, 1<<20, o), filepath.Join(t.TempDir(), "arena"))
			flushed, later := fill(8<<10, 1), fill(8<<10, 2)
			s.write(flushed, 0)
			if err := s.im.Flush(); err != nil {
				t.Fatal(err)
			}
			s.write(later, 512<<10)
			s.disk.Inject(&storagetest.Fault{Ops: storagetest.OpSync, N: 1, Err: syscall.EIO, Drop: true})
			if err := s.im.Flush(); !errors.Is(err, syscall.EIO) {
				t.Fatalf("Flush: %v, want EIO", err)
			}
			disk, arena := s.killed()
			for range 3 {
				s = serve(t, disk, arena)
				if s.err != nil {
					t.Fatal(s.err)
				}
				if err := s.im.Flush(); !errors.Is(err, qcow2.ErrFailed) {
					t.Errorf("Flush in the successor: %v, want ErrFailed", err)
				}
				if _, err := s.im.WriteAt(later, 0); !errors.Is(err, qcow2.ErrFailed) {
					t.Errorf("WriteAt in the successor: %v, want ErrFailed", err)
				}
				wantSame(t, "what was flushed", readAll(t, s.im)[:len(flushed)], flushed)
				disk, arena = s.killed()
			}
			s = serve(t, disk, arena)
			if err := s.im.Close(); !errors.Is(err, qcow2.ErrFailed) {
				t.Errorf("Close: %v, want ErrFailed", err)
			}
			disk, arena = s.killed()
			disk.Reopen()
			s = serve(t, disk, arena)
			if s.err != nil {
				t.Fatal(s.err)
			}
			wantSame(t, "what was flushed", readAll(t, s.im)[:len(flushed)], flushed)
			s.write(later, 0)
			if err := s.im.Close(); err != nil {
				t.Fatal(err)
			}
			verifyDisk(t, disk)
		})
	}
}

// TestFailedImageIsReadAsItWas takes a failed image over that has grown tables
// which the file does not have: reads see them.
func TestFailedImageIsReadAsItWas(t *testing.T) {
	s := serve(t, newDisk(t, 1<<20, qcow2.CreateOptions{ClusterSize: 4 << 10}), filepath.Join(t.TempDir(), "arena"))
	data := fill(64<<10, 3)
	s.write(data, 256<<10)
	s.disk.Inject(&storagetest.Fault{Ops: storagetest.OpWrite, N: 1, Err: syscall.EIO, Sticky: true})
	if err := s.im.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("Flush: %v, want EIO", err)
	}
	s = serve(t, first(s.killed()), second(s.killed()))
	if s.err != nil {
		t.Fatal(s.err)
	}
	wantSame(t, "content", readAll(t, s.im)[256<<10:][:len(data)], data)
}

func first(d *storagetest.Disk, _ string) *storagetest.Disk { return d }
func second(_ *storagetest.Disk, arena string) string       { return arena }

// TestTablesLostOfAFailedImage fails an image whose tables then make room for
// another's: a successor must not show it as it never was.
func TestTablesLostOfAFailedImage(t *testing.T) {
	s := serve(t, newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 512}), filepath.Join(t.TempDir(), "arena"))
	s.write(fill(1024, 4), 0)
	s.disk.Inject(&storagetest.Fault{Ops: storagetest.OpWrite, N: 1, Err: syscall.EIO, Sticky: true})
	if err := s.im.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("Flush: %v, want EIO", err)
	}
	other := newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 512})
	im, err := qcow2.Open(t.Context(), other, qcow2.Options{Cache: s.cache, ID: [16]byte{8}})
	if err != nil {
		t.Fatal(err)
	}
	for off := int64(0); off < im.Size(); off += 32 << 10 {
		if _, err := im.WriteAt(fill(512, 5), off); err != nil {
			t.Fatal(err)
		}
	}
	if s.im.CacheStats().Displaced == 0 {
		t.Fatal("nothing was displaced")
	}
	disk, arena := s.killed()
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	s = serve(t, disk, arena)
	if !errors.Is(s.err, qcow2.ErrFailed) {
		t.Fatalf("Open: %v, want ErrFailed", s.err)
	}
	disk, arena = s.killed()
	s = serve(t, disk, arena)
	if !errors.Is(s.err, qcow2.ErrFailed) {
		t.Errorf("Open in the next successor: %v, want ErrFailed", s.err)
	}
	if err := s.cache.Forget(servedID); err != nil {
		t.Fatal(err)
	}
	im, err = qcow2.Open(t.Context(), disk, qcow2.Options{Cache: s.cache, ID: servedID, Unclean: true})
	if err != nil {
		t.Fatalf("Open after Forget: %v", err)
	}
	if err := im.Close(); err != nil {
		t.Fatal(err)
	}
	verifyDisk(t, disk)
}

// TestForeignWriterIsNoticed has QEMU write the image after a kill: what the
// killed process had not written back is not put over that.
func TestForeignWriterIsNoticed(t *testing.T) {
	for name, write := range map[string]func(path string){
		"qemu-io":         func(path string) { qemutest.IO(t, path, "write -P 0x55 0 256k") },
		"qemu-img":        func(path string) { qemutest.Img(t, "snapshot", "-c", "theirs", path) },
		"qemu-img resize": func(path string) { qemutest.Img(t, "resize", path, "8M") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := scratch(t)
			path, arena := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "arena")
			s := serve(t, newDisk(t, 4<<20, qcow2.CreateOptions{ClusterSize: 4 << 10}), arena)
			s.write(fill(64<<10, 1), 0)
			if err := s.im.Flush(); err != nil {
				t.Fatal(err)
			}
			s.write(fill(512<<10, 2), 1<<20)
			if s.im.CacheStats().DirtyTables == 0 {
				t.Fatal("nothing is dirty")
			}
			disk, arena := s.killed()
			if err := disk.Dump(path); err != nil {
				t.Fatal(err)
			}
			write(path)
			want := filepath.Join(dir, "want.raw")
			qemutest.Raw(t, path, "", want)

			c, err := cache.New(cache.Options{Bytes: 32 << 10, Path: arena})
			if err != nil {
				t.Fatal(err)
			}
			f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
			if err != nil {
				t.Fatal(err)
			}
			im, err := qcow2.Open(t.Context(), f, qcow2.Options{Cache: c, ID: servedID, Unclean: true})
			if err != nil {
				t.Fatal(err)
			}
			if err := im.Close(); err != nil {
				t.Fatal(err)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			qemutest.Check(t, path)
			qemutest.Compare(t, "raw", want, "qcow2", path)
		})
	}
}
