package storagetest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestDiskIsFile(t *testing.T) {
	TestFile(t, func(*testing.T) File { return NewDisk() })
}

// contents returns the distinct one-letter-per-sector images of the states of
// l: '.' is a zero sector, else its first byte.
func contents(l *Log, random int) map[string]bool {
	got := make(map[string]bool)
	for s := range l.States(rand.New(rand.NewPCG(1, 2)), random) {
		d := s.Disk()
		b := make([]byte, d.size)
		d.ReadAt(b, 0)
		text := ""
		for i := 0; i < len(b); i += SectorSize {
			if b[i] == 0 {
				text += "."
			} else {
				text += string(b[i])
			}
		}
		got[fmt.Sprintf("%d %s", s.At, text)] = true
	}
	return got
}

func sectors(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n*SectorSize) }

// wantStates compares only the named states: those must appear, the others must not.
func wantStates(t *testing.T, got map[string]bool, yes, no []string) {
	t.Helper()
	for _, s := range yes {
		if !got[s] {
			t.Errorf("state %q is missing from %v", s, got)
		}
	}
	for _, s := range no {
		if got[s] {
			t.Errorf("state %q is not legal", s)
		}
	}
}

func TestStatesReorderAndLose(t *testing.T) {
	d := NewDisk()
	d.Truncate(2 * PageSize)
	l := d.Record()
	d.WriteAt(sectors('a', 1), 0)
	d.WriteAt(sectors('b', 1), PageSize)
	d.Datasync()
	d.WriteAt(sectors('c', 1), PageSize)
	z := "......."
	wantStates(t, contents(l, 0),
		[]string{"0 ." + z + "." + z, "1 a" + z + "." + z, "2 a" + z + "b" + z, "2 ." + z + "b" + z, "3 a" + z + "b" + z, "4 a" + z + "c" + z},
		[]string{"4 a" + z + "." + z, "4 ." + z + "c" + z, "3 ." + z + "b" + z})
}

func TestStatesHistoricVersionsAndTears(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), 0)
	l := d.Record()
	d.WriteAt(sectors('b', 8), 0)
	d.WriteAt(sectors('c', 8), 0)
	got := contents(l, 400)
	wantStates(t, got, []string{"0 aaaaaaaa", "1 bbbbbbbb", "2 cccccccc"}, nil)
	var torn bool
	for s := range got {
		text := s[2:]
		torn = torn || text != "aaaaaaaa" && text != "bbbbbbbb" && text != "cccccccc"
		if bytes.ContainsAny([]byte(text), "a") && bytes.ContainsAny([]byte(text), "c") {
			t.Errorf("state %q mixes versions that did not follow each other", s)
		}
	}
	if !torn {
		t.Error("no torn page among 400 random states")
	}
	if !got["2 bbbbbbbb"] && !got["1 bbbbbbbb"] {
		t.Error("the version between was never kept")
	}
}

func TestStatesSizeIsIndependent(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), 0)
	l := d.Record()
	d.WriteAt(sectors('b', 8), PageSize)
	wantStates(t, contents(l, 200), []string{"0 aaaaaaaa", "1 aaaaaaaabbbbbbbb", "1 aaaaaaaa........"}, nil)

	d.Truncate(SectorSize)
	d.Truncate(PageSize)
	got := contents(l, 400)
	wantStates(t, got, []string{"2 a", "2 a......."}, nil)
	for s := range got {
		if s == "3 abbbbbbb" {
			t.Errorf("state %q shows bytes of another offset", s)
		}
	}
}

func TestStatesPunchMayReturn(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 16), 0)
	l := d.Record()
	d.Punch(0, PageSize)
	wantStates(t, contents(l, 0), []string{"0 aaaaaaaaaaaaaaaa", "1 ........aaaaaaaa"}, nil)
	d.Datasync()
	d.WriteAt(sectors('b', 8), 0)
	wantStates(t, contents(l, 0), []string{"3 bbbbbbbbaaaaaaaa"}, []string{"3 aaaaaaaaaaaaaaaa"})
}

func TestStateDiskIsIndependent(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), 0)
	l := d.Record()
	var disks []*Disk
	d.WriteAt(sectors('b', 1), 0)
	for s := range l.States(rand.New(rand.NewPCG(1, 1)), 0) {
		disks = append(disks, s.Disk())
	}
	for _, s := range disks {
		s.WriteAt(sectors('x', 8), 0)
		s.Datasync()
	}
	wantStates(t, contents(l, 0), []string{"0 aaaaaaaa", "1 baaaaaaa"}, []string{"0 xxxxxxxx", "1 xxxxxxxx"})
	if c := d.Clone(); c.size != d.size {
		t.Errorf("clone has %d bytes, want %d", c.size, d.size)
	}
}

func TestFaultNthOperation(t *testing.T) {
	for _, sticky := range []bool{false, true} {
		d := NewDisk()
		f := &Fault{Ops: OpWrites, N: 3, Err: syscall.ENOSPC, Sticky: sticky}
		d.Inject(f)
		var failed []int
		for i := 1; i <= 5; i++ {
			if _, err := d.WriteAt(sectors('a', 1), 0); errors.Is(err, syscall.ENOSPC) {
				failed = append(failed, i)
			}
		}
		want := "[3]"
		if sticky {
			want = "[3 4 5]"
		}
		if got := fmt.Sprint(failed); got != want || d.Hits(f) != len(failed) {
			t.Errorf("sticky %v: failed %v with %d hits, want %v", sticky, got, d.Hits(f), want)
		}
		d.Clear()
		if _, err := d.WriteAt(sectors('a', 1), 0); err != nil {
			t.Errorf("after Clear: %v", err)
		}
	}
}

func TestFaultShortWriteStoresHalf(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 2), 0)
	d.Inject(&Fault{Ops: OpWrites, N: 1, Err: syscall.EIO, Short: true})
	if n, err := d.WritevAt([][]byte{sectors('b', 1), sectors('b', 1)}, 0); n != SectorSize || !errors.Is(err, syscall.EIO) {
		t.Fatalf("WritevAt = %d, %v, want %d, EIO", n, err, SectorSize)
	}
	wantContent(t, d, append(sectors('b', 1), sectors('a', 1)...))
}

func TestFaultDropLosesDirtyPages(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), 0)
	l := d.Record()
	d.WriteAt(sectors('b', 16), 0)
	d.Inject(&Fault{Ops: OpSync, N: 1, Err: syscall.EIO, Drop: true})
	if err := d.Datasync(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("Datasync: %v, want EIO", err)
	}
	wantContent(t, d, sectors('a', 8))
	if err := d.Datasync(); err != nil {
		t.Fatalf("second Datasync: %v", err)
	}
	wantContent(t, d, sectors('a', 8))
	wantStates(t, contents(l, 0), []string{"0 aaaaaaaa"}, []string{"3 bbbbbbbbbbbbbbbb"})
}

func TestCounts(t *testing.T) {
	d := NewDisk()
	d.WriteAt(make([]byte, 100), 0)
	d.WritevAt([][]byte{make([]byte, 10), make([]byte, 20)}, 0)
	d.Datasync()
	if d.Count(OpWrites) != 2 || d.Count(OpSync) != 1 || d.Count(OpAny) != 3 || d.Bytes(OpWrites) != 130 {
		t.Errorf("counts are %d writes, %d syncs, %d in all, %d bytes", d.Count(OpWrites), d.Count(OpSync), d.Count(OpAny), d.Bytes(OpWrites))
	}
	d.ResetCounts()
	if d.Count(OpAny) != 0 {
		t.Error("counts after ResetCounts")
	}
}

func TestDirectRefusesUnaligned(t *testing.T) {
	d := NewDisk()
	d.SetDirect(512)
	buf := make([]byte, 2048)
	for i := range buf {
		if _, err := d.WriteAt(buf[i:i+512], 0); err == nil {
			buf = buf[i:] // the aligned start
			break
		}
	}
	for _, test := range []struct {
		p   []byte
		off int64
	}{{buf[1:513], 0}, {buf[:511], 0}, {buf[:512], 100}} {
		if _, err := d.WriteAt(test.p, test.off); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("write of %d bytes at %d: %v, want EINVAL", len(test.p), test.off, err)
		}
	}
	if _, err := d.WriteAt(buf[:512], 512); err != nil {
		t.Errorf("aligned write: %v", err)
	}
}

func TestDumpAndLoad(t *testing.T) {
	d := NewDisk()
	d.WriteAt(pattern(10000, 1), 1<<20+100)
	path := filepath.Join(t.TempDir(), "f")
	if err := d.Dump(path); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wantContent(t, d, b)
	e, err := LoadDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	wantContent(t, e, b)
	if e.Allocated() > 5*PageSize {
		t.Errorf("loaded disk holds %d bytes in pages", e.Allocated())
	}
}

func TestCrashCloneIsLegal(t *testing.T) {
	d := NewDisk()
	d.Record()
	d.WriteAt(sectors('a', 8), 0)
	d.Datasync()
	d.WriteAt(sectors('b', 8), 0)
	rng := rand.New(rand.NewPCG(1, 1))
	seen := make(map[byte]int)
	for range 100 {
		c := d.CrashClone(rng)
		b := make([]byte, PageSize)
		if n, _ := c.ReadAt(b, 0); n != PageSize {
			t.Fatalf("crash clone has %d bytes, want %d", n, PageSize)
		}
		for _, x := range b {
			seen[x]++
		}
	}
	if len(seen) != 2 || seen['a'] == 0 || seen['b'] == 0 {
		t.Errorf("crash clones hold %v, want both a and b only", seen)
	}
}

func TestEqual(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), PageSize)
	e := d.Clone()
	e.WriteAt(make([]byte, PageSize), 0) // a page of zeroes is a hole
	if !d.Equal(e) {
		t.Error("equal contents are not equal")
	}
	e.WriteAt([]byte{1}, 100)
	if d.Equal(e) {
		t.Error("other contents are equal")
	}
	e = d.Clone()
	e.Truncate(3 * PageSize)
	if d.Equal(e) {
		t.Error("other sizes are equal")
	}
}

func TestCapacity(t *testing.T) {
	d := NewDisk()
	d.WriteAt(sectors('a', 8), 0)
	d.SetCapacity(2 * PageSize)
	if _, err := d.WriteAt(sectors('b', 16), PageSize); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write beyond the capacity: %v, want ENOSPC", err)
	}
	if _, err := d.WriteAt(sectors('b', 16), 0); err != nil {
		t.Errorf("write within the capacity: %v", err)
	}
	if _, err := d.WriteAt(sectors('c', 16), 0); err != nil {
		t.Errorf("overwrite in a full file system: %v", err)
	}
	wantContent(t, d, sectors('c', 16))
}

func TestHookHoldsBack(t *testing.T) {
	d := NewDisk()
	held, release := make(chan struct{}), make(chan struct{})
	d.SetHook(func(op Op, off int64) {
		if op == OpWrite && off == 512 {
			close(held)
			<-release
		}
	})
	done := make(chan struct{})
	go func() { // ends when released
		d.WriteAt(sectors('b', 1), 512)
		close(done)
	}()
	<-held
	d.WriteAt(sectors('a', 1), 0)
	wantContent(t, d, sectors('a', 1))
	close(release)
	<-done
	d.SetHook(nil)
	wantContent(t, d, append(sectors('a', 1), sectors('b', 1)...))
}
