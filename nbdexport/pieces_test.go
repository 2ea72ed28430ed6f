package nbdexport_test

import (
	"bytes"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// granular is memory that remembers where the writes to it ended.
type granular struct {
	*nbdtest.Memory
	granule int64

	mu   sync.Mutex
	ends []int64 // guarded by mu
}

func (g *granular) WriteGranule() int64 { return g.granule }

func (g *granular) WriteAt(p []byte, off int64) (int, error) {
	g.mu.Lock()
	g.ends = append(g.ends, off+int64(len(p)))
	g.mu.Unlock()
	return g.Memory.WriteAt(p, off)
}

// TestPiecesKeepGranules checks that a long write is cut where it cuts no granule,
// and nowhere at all when granules are long.
func TestPiecesKeepGranules(t *testing.T) {
	const off, end = 300 << 10, 1 << 20
	for _, tt := range []struct {
		granule int64
		ends    []int64
	}{
		{0, []int64{512 << 10, 768 << 10, end}},
		{64 << 10, []int64{512 << 10, 768 << 10, end}},
		{2 << 20, []int64{end}},
	} {
		m := &granular{Memory: nbdtest.NewMemory(4 << 20), granule: tt.granule}
		c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
		c.Start("", nbdtest.Simple)
		if r := write(c, 0, off, randomBytes(1, end-off)); r.Err != 0 {
			t.Fatal(r.Err, r.Text)
		}
		m.mu.Lock()
		if !slices.Equal(m.ends, tt.ends) {
			t.Errorf("granule of %d bytes: writes end at %d: want %d", tt.granule, m.ends, tt.ends)
		}
		m.mu.Unlock()
	}
}

// TestLongWriteFailsInItsMiddle checks that a piece that fails ends its own request
// alone, with what failed first.
func TestLongWriteFailsInItsMiddle(t *testing.T) {
	const n = 1 << 20
	m := nbdtest.NewMemory(4 * n)
	m.Before = func(op string, off, length int64) error {
		covers := func(at int64) bool { return op == "write" && off <= at && at < off+length }
		switch {
		case covers(n + 256<<10):
			return unix.ENOSPC
		case covers(n + 512<<10):
			return unix.EIO
		}
		return nil
	}
	c := startServer(t, nbdexport.ServerOptions{}, &nbdexport.Export{Backend: m}).client()
	c.Start("", nbdtest.Structured)
	data := randomBytes(1, n)
	for i, want := range []unix.Errno{0, unix.ENOSPC, 0} {
		off := uint64(i) * n
		if r := write(c, 0, off, data); r.Err != want {
			t.Errorf("write %d: error %d %s: want %d", i, r.Err, r.Text, want)
		}
		if r := read(c, off, n); want == 0 && !bytes.Equal(r.Data, data) {
			t.Errorf("write %d is not what is read", i)
		}
	}
}
