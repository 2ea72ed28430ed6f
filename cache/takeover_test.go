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

// arenaPath returns where a test puts its arena.
func arenaPath(t testing.TB) string { return filepath.Join(t.TempDir(), "arena") }

func newArenaCache(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// kill copies what a kill would leave of the arena of c now, and returns the
// path of the copy. The goroutines that change the arena are held up meanwhile.
func kill(t testing.TB, c *Cache) string {
	t.Helper()
	path := arenaPath(t)
	if err := os.WriteFile(path, c.arena.mem, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestArenaFileIsLocked(t *testing.T) {
	o := Options{Bytes: minBytes, Path: arenaPath(t)}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(o); !errors.Is(err, ErrInUse) {
		t.Errorf("second New: %v, want ErrInUse", err)
	}
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

func TestTakeoverFindsDirtyTables(t *testing.T) {
	f := newRecorder(1 << 20)
	c := newArenaCache(t, Options{Bytes: 64 * slotBytes, Path: arenaPath(t), Generation: 3})
	o := HandleOptions{ID: [16]byte{1, 2, 3}, Classes: 3, SliceBytes: 1024}
	h := open(t, c, f, o)
	other := open(t, c, newRecorder(1<<20), HandleOptions{ID: [16]byte{9}})
	anonymous := open(t, c, newRecorder(1<<20), HandleOptions{})
	store(t, h, 0, 1024, 5, 1)
	store(t, h, 1, 2048, 0, 7) // written back below
	writeBack(t, h)
	store(t, h, 0, 1024, 6, 2)
	store(t, h, 2, 8192, 127, 3)
	get(t, h, 0, 4096).Unpin()
	store(t, other, 0, 0, 0, 4)
	store(t, anonymous, 0, 0, 0, 5)
	f.take()

	path := kill(t, c)
	for round := range 3 { // a takeover that is killed is taken over again
		c2, err := New(Options{Bytes: minBytes, Path: path, Generation: 3})
		if err != nil {
			t.Fatal(err)
		}
		if got := len(c2.slots); got != 64 {
			t.Errorf("the arena has %d slots, want the predecessor's 64", got)
		}
		us := c2.Unclaimed()
		slices.SortFunc(us, func(a, b Unclaimed) int { return a.Tables - b.Tables })
		want := []Unclaimed{{ID: [16]byte{9}, Tables: 1}, {ID: [16]byte{1, 2, 3}, Tables: 2}}
		if !slices.Equal(us, want) {
			t.Errorf("unclaimed %v, want %v", us, want)
		}
		path = kill(t, c2)
		if round < 2 {
			if err := c2.Close(); err != nil {
				t.Error(err)
			}
			continue
		}
		bad := o
		bad.SliceBytes = 512
		if _, err := c2.Open(f, bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open with another slice: %v, want ErrInvalid", err)
		}
		bad = o
		bad.Classes = 2
		if _, err := c2.Open(f, bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("Open with too few classes: %v, want ErrInvalid", err)
		}
		h2, err := c2.Open(f, o)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c2.Open(f, o); !errors.Is(err, ErrInUse) {
			t.Errorf("second Open: %v, want ErrInUse", err)
		}
		if h2.Adopted() != 2 || h2.DirtyTables() != 2 {
			t.Errorf("adopted %d, dirty %d; want 2, 2", h2.Adopted(), h2.DirtyTables())
		}
		reads := f.reads
		for _, w := range []struct {
			off  int64
			i    int
			want uint64
		}{{1024, 5, 1}, {1024, 6, 2}, {8192, 127, 3}} {
			if got := load(t, h2, w.off, w.i); got != w.want {
				t.Errorf("table %#x word %d: %d, want %d", w.off, w.i, got, w.want)
			}
		}
		if f.reads != reads {
			t.Errorf("%d reads of adopted tables", f.reads-reads)
		}
		if got := load(t, h2, 2048, 0); got != 7 {
			t.Errorf("table that was written back: %d, want 7", got)
		}
		if err := h2.Close(); err != nil {
			t.Fatal(err)
		}
		if got := f.take(); !slices.Equal(got, []string{"w 0x400+1024", "s", "w 0x2000+1024", "s"}) {
			t.Errorf("operations %v", got)
		}
		if err := c2.Forget([16]byte{9}); err != nil {
			t.Error(err)
		}
		if us := c2.Unclaimed(); len(us) != 0 {
			t.Errorf("unclaimed %v, want none", us)
		}
		if err := c2.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestArenaAfterCloseIsEmpty: an orderly end leaves nothing to take over, and
// the next arena has the size that is asked for.
func TestArenaAfterCloseIsEmpty(t *testing.T) {
	o := Options{Bytes: 16 * slotBytes, Path: arenaPath(t)}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	h, err := c.Open(newRecorder(0), HandleOptions{ID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	store(t, h, 0, 0, 0, 1)
	if err := errors.Join(h.Close(), c.Close()); err != nil {
		t.Fatal(err)
	}
	o.Bytes *= 2
	c = newArenaCache(t, o)
	if len(c.Unclaimed()) != 0 || len(c.slots) != 32 {
		t.Errorf("unclaimed %v, %d slots; want none, 32", c.Unclaimed(), len(c.slots))
	}
}

// TestUnclaimedTablesAreKept fills a set with tables of an image that is not
// open after the takeover: others get an error, not its place.
func TestUnclaimedTablesAreKept(t *testing.T) {
	c := newArenaCache(t, Options{Bytes: minBytes, Path: arenaPath(t)})
	f := newRecorder(0)
	o := HandleOptions{ID: [16]byte{1}}
	h := open(t, c, f, o)
	for i := range ways {
		store(t, h, 0, int64(i)*4096, 0, uint64(i)+1)
	}
	c2 := newArenaCache(t, Options{Bytes: minBytes, Path: kill(t, c)})
	other := open(t, c2, newRecorder(0), HandleOptions{ID: [16]byte{2}})
	if _, err := other.Get(0, 0); !errors.Is(err, ErrUnclaimed) {
		t.Errorf("Get: %v, want ErrUnclaimed", err)
	}
	if _, err := other.Create(0, 0); !errors.Is(err, ErrUnclaimed) {
		t.Errorf("Create: %v, want ErrUnclaimed", err)
	}
	h2 := open(t, c2, f, o)
	get(t, other, 0, 0).Unpin() // writes back what was adopted
	for i := range ways {
		if got := load(t, h2, int64(i)*4096, 0); got != uint64(i)+1 {
			t.Errorf("table %d: %d, want %d", i, got, i+1)
		}
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
