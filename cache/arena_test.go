package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestArenaFileIsLocked(t *testing.T) {
	o := Options{Bytes: minBytes, Path: arenaPath(t)}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); !errors.Is(err, ErrInUse) {
		t.Errorf("second New: %v, want ErrInUse", err)
	}
	// A child between fork and exec has a copy of every descriptor.
	child, err := unix.FcntlInt(c.arena.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(child)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	c, err = New(o)
	if err != nil {
		t.Fatalf("New after Close: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestDamagedArenaIsRefused flips each bit of the header and of each used
// directory entry, truncates, extends and moves the arena to another boot,
// generation and layout. It is refused, nothing of it is changed, and Fresh goes on.
func TestDamagedArenaIsRefused(t *testing.T) {
	o := Options{Bytes: minBytes, Path: arenaPath(t), Generation: 8}
	c := newArenaCache(t, o)
	h := open(t, c, newRecorder(0), HandleOptions{ID: [16]byte{1, 15: 2}, SliceBytes: 512})
	for i := range 3 {
		store(t, h, 0, int64(i)*512, 0, 1)
	}
	get(t, h, 0, 1<<20).Unpin() // a clean one
	whole, err := os.ReadFile(o.Path)
	if err != nil {
		t.Fatal(err)
	}
	path := arenaPath(t)
	refused := func(what string, b []byte, generation uint64) {
		t.Helper()
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := New(Options{Bytes: minBytes, Path: path, Generation: generation})
		if err == nil {
			t.Errorf("%s: accepted", what)
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			return
		}
		var ae *ArenaError
		if !errors.As(err, &ae) || !errors.Is(err, ErrArena) || ae.Path != path {
			t.Errorf("%s: %v, want an ArenaError", what, err)
		}
		after, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(after, b) {
			t.Errorf("%s: the arena was changed", what)
		}
	}
	edit := func(f func(b []byte)) []byte {
		b := slices.Clone(whole)
		f(b)
		return b
	}
	reheader := func(f func(h *header, b []byte)) []byte {
		return edit(func(b []byte) {
			h, err := decodeHeader(b)
			if err != nil {
				t.Fatal(err)
			}
			f(&h, b)
			h.encode(b)
		})
	}
	flips := 0
	flip := func(what string, from, n int) {
		for bit := range n * 8 {
			refused(what, edit(func(b []byte) { b[from+bit/8] ^= 1 << (bit % 8) }), 8)
			flips++
		}
	}
	flip("header", 0, headerBytes)
	for i := range slotIndex(ways) {
		if h.c.arena.state(i).dirty() {
			flip("dirty entry", headerSize+int(i)*entryBytes, entryBytes)
		} else {
			flip("state of another entry", headerSize+int(i)*entryBytes, 8)
		}
	}
	if flips < 2000 {
		t.Errorf("%d bits flipped, want 2000 at least", flips)
	}
	for _, n := range []int{1, 8, 63, 64, headerSize, len(whole) - 1, len(whole) - slotBytes} {
		refused("truncated", whole[:n], 8)
	}
	refused("extended", append(slices.Clone(whole), 0), 8)
	refused("other generation", whole, 7)
	refused("foreign file", []byte("QFI\xfb and so on"), 8)
	refused("other boot", reheader(func(h *header, _ []byte) { h.bootID[3]++ }), 8)
	refused("more slots", reheader(func(h *header, _ []byte) { h.slots += ways }), 8)
	refused("no slots", reheader(func(h *header, _ []byte) { h.slots = 0 }), 8)
	refused("most slots", reheader(func(h *header, _ []byte) { h.slots = 1<<64 - ways }), 8)
	refused("other layout", edit(func(b []byte) { b[8]++; sign(b) }), 8)
	refused("other slot size", edit(func(b []byte) { b[13]++; sign(b) }), 8)
	var dirty []slotIndex
	for i := range slotIndex(ways) {
		if h.c.arena.state(i).dirty() {
			dirty = append(dirty, i)
		}
	}
	reentry := func(word int, v uint64) []byte {
		return edit(func(b []byte) {
			a := newArena(b, ways)
			a.store(a.word(dirty[1], uintptr(word)), v)
			a.store(a.word(dirty[1], wordCheck), a.checkOf(dirty[1]))
		})
	}
	first := h.c.arena.load(dirty[0], wordOffset)
	refused("table in two slots", reentry(wordOffset, first), 8)
	refused("offset not aligned", reentry(wordOffset, 1<<20+8), 8)
	refused("offset too large", reentry(wordOffset, 1<<56), 8)
	refused("slice of 0 bytes", reentry(wordLength, 0), 8)
	refused("slice of 8192 bytes", reentry(wordLength, 8192), 8)
	refused("two slices in an image", reentry(wordLength, 1024), 8)

	if err := os.WriteFile(path, edit(func(b []byte) { b[20] ^= 1 }), 0o600); err != nil {
		t.Fatal(err)
	}
	c2 := newArenaCache(t, Options{Bytes: minBytes, Path: path, Fresh: true})
	if us := c2.Unclaimed(); len(us) != 0 {
		t.Errorf("fresh arena has tables of %v", us)
	}
}

// sign makes the checksum of the header in b right.
func sign(b []byte) {
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// TestTableInWrongSetIsRefused moves a whole entry to another set.
func TestTableInWrongSetIsRefused(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: 2 * minBytes, Path: arenaPath(t)})
	h := open(t, c, newRecorder(0), HandleOptions{ID: [16]byte{1}})
	store(t, h, 0, 0, 0, 1)
	_, n := c.set(h.seed, 0)
	from, to := slotIndex(n*ways), slotIndex((1-n)*ways)
	path := kill(t, c)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	a := newArena(b, 2*ways)
	copy(b[headerSize+int(to)*entryBytes:][:entryBytes], b[headerSize+int(from)*entryBytes:])
	a.unpublish(from)
	a.store(a.word(to, wordCheck), a.checkOf(to))
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Bytes: 2 * minBytes, Path: path}); !errors.Is(err, ErrArena) || !strings.Contains(err.Error(), "set") {
		t.Errorf("New: %v, want an ArenaError about the set", err)
	}
}

func TestArenaErrorsName(t *testing.T) {
	dir := t.TempDir()
	if _, err := New(Options{Path: filepath.Join(dir, "missing", "arena")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("New in a missing directory: %v", err)
	}
	if _, err := New(Options{Path: dir}); err == nil {
		t.Error("New at a directory: no error")
	}
	// A file that cannot grow stands for a tmpfs without space.
	fd, err := unix.MemfdCreate("arena", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	full := os.NewFile(uintptr(fd), "arena")
	defer full.Close()
	if _, err := unix.FcntlInt(full.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_GROW); err != nil {
		t.Fatal(err)
	}
	path := fmt.Sprintf("/proc/self/fd/%d", fd)
	if _, err := New(Options{Path: path, Bytes: minBytes}); !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), path) {
		t.Errorf("New without space: %v, want an error that names %q", err, path)
	}
}

// TestLockedArena: the memory of a locked arena counts as locked.
func TestLockedArena(t *testing.T) {
	before := lockedBytes(t)
	newArenaCache(t, Options{Path: arenaPath(t), Bytes: 64 * slotBytes, Lock: true})
	if got := lockedBytes(t) - before; got < 64*slotBytes {
		t.Errorf("%d bytes locked, want %d at least", got, 64*slotBytes)
	}
}

func lockedBytes(t *testing.T) (n int) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmLck:")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n << 10
}

// TestCloseLeavesNoDescriptor: neither an arena that is closed nor one that is refused.
func TestCloseLeavesNoDescriptor(t *testing.T) {
	path := arenaPath(t)
	round := func() {
		c, err := New(Options{Bytes: minBytes, Path: path})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Bytes: minBytes, Path: path}); !errors.Is(err, ErrInUse) {
			t.Errorf("second New: %v, want ErrInUse", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if _, err := New(Options{Bytes: minBytes, Path: path, Generation: 1}); !errors.Is(err, ErrArena) {
			t.Errorf("New of another generation: %v, want ErrArena", err)
		}
	}
	round()
	before := descriptors(t)
	for range 20 {
		round()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors open, %d before", after, before)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	ds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(ds)
}

// TestArenaCutShort: a kill while the arena is made leaves one that can be made again.
func TestArenaCutShort(t *testing.T) {
	_, size := arenaLayout(ways)
	for _, n := range []int64{0, headerSize, size} {
		path := arenaPath(t)
		if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		newArenaCache(t, Options{Bytes: minBytes, Path: path})
	}
}
