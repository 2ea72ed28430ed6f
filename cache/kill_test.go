package cache

import (
	"bufio"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

var killOps = flag.Uint64("kill-ops", 150, "operations of TestKillPoints; each has some ten states")

// A killRun runs random operations on two images in a tiny file arena, and
// at stores into the arena looks at what a kill just then would leave: a
// successor must find every acknowledged change.
type killRun struct {
	t      *testing.T
	rnd    *rand.Rand
	dir    string
	files  [2]*recorder
	want   [2][killTables][killWords]uint64 // acknowledged
	doing  killOp                           // not acknowledged yet
	looked int
	busy   bool // a look is running: its own stores are looked at by nested ones only
}

// A killOp is an operation under way.
type killOp struct {
	image, table int // -1 if none
	word         int // -1: any word of the table may change
	v            uint64
}

const (
	killTables = 14
	killWords  = 64
	killSlice  = killWords * 8
)

func killHandle(t *testing.T, c *Cache, image int, f File) *Handle {
	h, err := c.Open(f, HandleOptions{ID: [16]byte{byte(image) + 1}, SliceBytes: killSlice, Classes: 3})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// look takes over copies of the arena and the files as they are now. The
// successor is killed in turn at one of its own stores, down to depth more times.
func (r *killRun) look(mem []byte, files [2]*recorder, depth int) {
	t := r.t
	r.looked++
	path := filepath.Join(r.dir, "arena"+strconv.Itoa(depth))
	if err := os.WriteFile(path, mem, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, f := range files {
		files[i] = &recorder{data: slices.Clone(f.data)}
	}
	var c *Cache
	left := r.rnd.IntN(40) // stores until the successor is killed
	o := Options{Bytes: minBytes, Path: path, OnStore: func() {
		if left--; depth > 0 && left == 0 && c != nil {
			r.look(c.arena.mem, files, depth-1)
		}
	}}
	c, err := New(o)
	if err != nil {
		t.Errorf("takeover: %v", err)
		return
	}
	var hs [2]*Handle
	for image, f := range files {
		hs[image] = killHandle(t, c, image, f) // all, before any needs room
	}
	c.checkInvariants(t)
	for image, f := range files {
		h := hs[image]
		for table := range killTables {
			tab := get(t, h, Class(table%3), int64(table)*killSlice)
			for w, want := range r.want[image][table] {
				got := tab.Load(w)
				d := r.doing
				if d.image == image && d.table == table && (d.word < 0 || d.word == w && got == d.v) {
					continue
				}
				if got != want {
					t.Errorf("image %d table %d word %d: %#x after the kill, want %#x", image, table, w, got, want)
				}
			}
			tab.Unpin()
		}
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		for table := range killTables {
			for w, want := range r.want[image][table] {
				if d := r.doing; d.image == image && d.table == table {
					continue
				}
				if got := f.word(int64(table*killSlice + w*8)); got != want {
					t.Errorf("image %d table %d word %d: the file holds %#x, want %#x", image, table, w, got, want)
				}
			}
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestKillPoints looks at every store into the arena of a random workload.
func TestKillPoints(t *testing.T) {
	r := &killRun{t: t, rnd: random(t, 0), dir: t.TempDir(), doing: killOp{image: -1}}
	var c *Cache
	c, err := New(Options{Bytes: minBytes, Path: arenaPath(t), OnStore: func() {
		if c != nil && !r.busy && !t.Failed() {
			r.busy = true
			depth := 0
			if r.rnd.IntN(10) == 0 {
				depth = 3
			}
			r.look(c.arena.mem, r.files, depth)
			r.busy = false
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	var hs [2]*Handle
	for i := range r.files {
		r.files[i] = newRecorder(killTables * killSlice)
		hs[i] = killHandle(t, c, i, r.files[i])
	}
	for n := range *killOps {
		image, table, word := r.rnd.IntN(2), r.rnd.IntN(killTables), r.rnd.IntN(killWords)
		h, class, off := hs[image], Class(table%3), int64(table)*killSlice
		r.doing = killOp{image: -1}
		switch op := r.rnd.IntN(20); {
		case op < 15:
			tab := get(t, h, class, off)
			r.doing = killOp{image, table, word, n}
			tab.Store(word, n)
			r.want[image][table][word] = n
			tab.Unpin()
		case op < 17:
			r.doing = killOp{image, table, -1, 0}
			tab, err := h.Create(class, off)
			if err != nil {
				t.Fatal(err)
			}
			words := make([]uint64, killWords)
			for w := range words {
				words[w] = n + uint64(w)
			}
			tab.SetWords(0, words)
			tab.Unpin()
			r.want[image][table] = [killWords]uint64(words)
		case op < 18:
			r.doing = killOp{image, table, -1, 0}
			h.Drop(off)
			p := make([]byte, killSlice)
			for w := range killWords {
				r.want[image][table][w] = n ^ uint64(w)
				binary.BigEndian.PutUint64(p[w*8:], n^uint64(w))
			}
			if _, err := r.files[image].WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
		default:
			writeBack(t, h)
		}
	}
	r.doing = killOp{image: -1}
	c.checkInvariants(t)
	for _, h := range hs {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if r.looked < 1000 {
		t.Errorf("looked at %d states, want 1000 at least", r.looked)
	}
	t.Logf("%d kill states, nothing acknowledged lost", r.looked)
}

// An osFile is a File on a file descriptor.
type osFile struct{ *os.File }

func (f osFile) Datasync() error { return unix.Fdatasync(int(f.Fd())) }

const (
	loadDirEnv  = "CACHE_TEST_LOAD_DIR"
	loadWorkers = 4
	loadTables  = 64
	loadReport  = 200 // operations of a worker between two reports
)

// runLoad is the process that TestRealKills kills. It takes over what its
// predecessor left in dir, checks it against the acknowledgements in the file
// "acks", and goes on until it is killed. It reports with a letter per line on
// standard output: "r" for ready, then "p" for progress.
func runLoad(dir string) error {
	acks, err := os.OpenFile(filepath.Join(dir, "acks"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	image, err := os.OpenFile(filepath.Join(dir, "image"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	c, err := New(Options{Bytes: 32 * slotBytes, Path: filepath.Join(dir, "arena")})
	if err != nil {
		return err
	}
	h, err := c.Open(osFile{image}, HandleOptions{ID: [16]byte{1}, Classes: 3})
	if err != nil {
		return err
	}
	acked := make([]byte, loadTables*loadWorkers*8)
	if _, err := acks.ReadAt(acked, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for table := range loadTables {
		tab, err := h.Get(Class(table%3), int64(table)*slotBytes)
		if err != nil {
			return err
		}
		for w := range loadWorkers {
			want := binary.LittleEndian.Uint64(acked[(table*loadWorkers+w)*8:])
			if got := tab.Load(w); got != want && got != want+1 {
				return fmt.Errorf("table %d word %d: %d, acknowledged %d", table, w, got, want)
			}
		}
		tab.Unpin()
	}
	fmt.Printf("r%d\n", h.Adopted())
	var all sync.WaitGroup
	for w := range loadWorkers {
		all.Go(func() {
			for n := 1; ; n++ {
				table := rand.IntN(loadTables)
				tab, err := h.Get(Class(table%3), int64(table)*slotBytes)
				if err != nil {
					panic(err)
				}
				v := tab.Load(w) + 1
				tab.Store(w, v)
				tab.Unpin()
				var b [8]byte
				binary.LittleEndian.PutUint64(b[:], v)
				if _, err := acks.WriteAt(b[:], int64(table*loadWorkers+w)*8); err != nil {
					panic(err)
				}
				if n%50 == 0 && w == 0 {
					if err := h.WriteBack(); err != nil {
						panic(err)
					}
				}
				if n%loadReport == 0 {
					fmt.Println("p")
				}
			}
		})
	}
	all.Wait()
	return nil
}

// TestRealKills kills a process under load again and again. Each successor
// finds all that was acknowledged before.
func TestRealKills(t *testing.T) {
	dir := t.TempDir()
	adopted := 0
	rnd := random(t, 0)
	for round := range 25 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), loadDirEnv+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for left := 1 + rnd.IntN(20); left > 0 && lines.Scan(); left-- {
			if n, err := strconv.Atoi(lines.Text()[1:]); err == nil {
				adopted += n
			}
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Errorf("round %d: the process ended by itself: %v", round, err)
		}
		for lines.Scan() {
		}
		_ = cmd.Wait() // it was killed
		if status := cmd.ProcessState.ExitCode(); status != -1 {
			t.Fatalf("round %d: exit status %d", round, status)
		}
	}
	if adopted == 0 {
		t.Error("no table was ever adopted: the test shows nothing")
	}
	t.Logf("25 kills, %d dirty tables adopted, nothing acknowledged lost", adopted)
}
