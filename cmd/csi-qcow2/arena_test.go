package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"csi-qcow2/cache"
)

// TestArenaID: the ID of an arena stays for as long as nothing of it is lost.
func TestArenaID(t *testing.T) {
	const bytes = 1 << 20
	dir := t.TempDir()
	file := filepath.Join(dir, arenaName)
	open := func() *arena {
		t.Helper()
		a, err := openArena(t.Context(), 0, dir, bytes)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	// end ends the use of a; a process that is killed does not empty the file.
	end := func(a *arena, killed bool) {
		t.Helper()
		closing := a.close
		if killed {
			closing = a.Cache.Close
		}
		if err := closing(); err != nil {
			t.Fatal(err)
		}
	}
	change := func(off int64) {
		t.Helper()
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, off); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 0x80
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
	}
	const layoutOffset, bootOffset = 8, 24 // of the arena's header

	first := open()
	id := first.id
	if id == "" {
		t.Fatal("no ID")
	}
	if _, err := openArena(t.Context(), 0, dir, bytes); !errors.Is(err, cache.ErrInUse) {
		t.Errorf("a second process: %v, want ErrInUse", err)
	}
	end(first, false)
	if fi, err := os.Stat(file); err != nil || fi.Size() != 0 {
		t.Errorf("an end in order leaves %d bytes, %v", fi.Size(), err)
	}
	for _, killed := range []bool{true, true, false} {
		a := open()
		if a.id != id {
			t.Errorf("ID %q, was %q", a.id, id)
		}
		end(a, killed)
	}

	end(open(), true)
	change(layoutOffset)
	if _, err := openArena(t.Context(), 0, dir, bytes); !errors.Is(err, cache.ErrArenaLayout) {
		t.Errorf("another layout: %v, want ErrArenaLayout", err)
	}
	change(layoutOffset)
	kept := open()
	if kept.id != id {
		t.Errorf("ID after a refusal %q, was %q", kept.id, id)
	}
	end(kept, true)

	change(bootOffset)
	damaged := open()
	if damaged.id == id {
		t.Error("a lost arena has kept its ID")
	}
	id = damaged.id
	end(damaged, true)

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	removed := open()
	if removed.id == id {
		t.Error("a removed arena has kept its ID")
	}
	end(removed, false)
}
