package volume

import (
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a snapshot holds alone comes back to the host with its last dependent,
// never before and always then: in every order, whether dependents are deleted or
// become independent, and with dependents of dependents.
func TestSpaceComesBackWithTheLastDependent(t *testing.T) {
	const (
		n     = 2 << 20   // bytes that the snapshot holds alone
		slack = 512 << 10 // metadata comes and goes
	)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	p := newPool(t)
	for round := range 16 {
		name := func(s string) string { return s + itoa(int64(round)) }
		a := create(t, p, name("a"), Source{})
		write(t, p, a.ID, 0, 1, n)
		s := snapshot(t, p, name("s"), a.ID)
		write(t, p, a.ID, 0, 2, n)

		// Each end takes one dependent away.
		var ends []func()
		var volumes []string
		for i := range 1 + random.IntN(3) {
			mode := []CloneMode{CloneLinked, CloneCopy}[random.IntN(2)]
			v := clone(t, p, name("clone"+itoa(int64(i))), Source{Snapshot: s.ID}, mode)
			if mode == CloneCopy && random.IntN(2) == 0 {
				ends = append(ends, func() {
					if err := p.copyVolume(t.Context(), v.ID); err != nil {
						t.Fatal(err)
					}
				})
				volumes = append(volumes, v.ID)
				continue
			}
			ends = append(ends, func() { remove(t, p, v.ID) })
			if random.IntN(2) == 0 {
				child := clone(t, p, name("child"+itoa(int64(i))), Source{Volume: v.ID}, CloneLinked)
				ends = append(ends, func() {
					wantBytes(t, p, child.ID, 0, 1, n)
					remove(t, p, child.ID)
				})
			}
		}
		gone := random.IntN(2) == 0 // the volume goes as well
		remove(t, p, s.ID)
		if gone {
			remove(t, p, a.ID)
		}
		reap(t, p)
		before := allocated(t, imagePath(p, a.ID))
		random.Shuffle(len(ends), func(i, j int) { ends[i], ends[j] = ends[j], ends[i] })
		for i, end := range ends {
			if got := allocated(t, imagePath(p, a.ID)); got < before-slack {
				t.Fatalf("round %d: with %d dependents left the image takes %d bytes, %d at first", round, len(ends)-i, got, before)
			}
			end()
			reap(t, p)
		}
		if gone {
			if _, err := os.Stat(imagePath(p, a.ID)); !os.IsNotExist(err) {
				t.Fatalf("round %d: the deleted volume is left: %v", round, err)
			}
		} else if got := allocated(t, imagePath(p, a.ID)); got > before-n+slack {
			t.Fatalf("round %d: without dependents the image takes %d bytes, %d at first", round, got, before)
		}
		for _, id := range volumes {
			wantBytes(t, p, id, 0, 1, n)
		}
		if !gone {
			volumes = append(volumes, a.ID)
		}
		remove(t, p, slices.Compact(volumes)...)
		reap(t, p)
		if left := files(t, p.Path()); len(left) > 0 {
			t.Fatalf("round %d: left %q", round, left)
		}
	}
}

// Clones of clones read through every level, each into a larger volume than its
// source, and each level keeps what it has overwritten.
func TestNestedLargerClones(t *testing.T) {
	const n, levels = 1 << 20, 10
	p := newPool(t)
	v := create(t, p, "0", Source{})
	write(t, p, v.ID, 0, 1, n)
	ids := []string{v.ID}
	for i := 1; i <= levels; i++ {
		next, err := p.Create(t.Context(), CreateRequest{Name: itoa(int64(i)), Size: SizeRange{Required: v.Size + n}, Params: DefaultParams(), Source: Source{Volume: v.ID}})
		if err != nil || next.Size != v.Size+n {
			t.Fatalf("level %d: %d bytes, %v", i, next.Size, err)
		}
		v = next
		write(t, p, v.ID, v.Size-n, byte(i+1), n) // what only this level and those above have
		ids = append(ids, v.ID)
	}
	for _, id := range ids[:len(ids)-1] {
		remove(t, p, id)
	}
	reap(t, p)
	wantBytes(t, p, v.ID, 0, 1, n)
	wantBytes(t, p, v.ID, n, 0, n)
	for i := 1; i <= levels; i++ {
		off := int64(8+i-1) * n
		wantBytes(t, p, v.ID, off, byte(i+1), n)
		wantQEMU(t, imagePath(p, v.ID), off, byte(i+1), n)
	}
	remove(t, p, v.ID)
	reap(t, p)
	if left := files(t, p.Path()); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// The blocks of a file system are counted in its own unit, whatever it likes to be
// asked for at once, and without overflow.
func TestCapacityUnits(t *testing.T) {
	for _, c := range []struct {
		st    unix.Statfs_t
		total int64
	}{
		{unix.Statfs_t{Blocks: 100, Bavail: 50, Bsize: 4096, Frsize: 4096}, 100 * 4096},
		{unix.Statfs_t{Blocks: 100, Bavail: 50, Bsize: 128 << 10, Frsize: 4096}, 100 * 4096},
		{unix.Statfs_t{Blocks: 100, Bavail: 50, Bsize: 4096}, 100 * 4096},
	} {
		if got, want := capacity(&c.st), (Capacity{Total: c.total, Available: c.total / 2}); got != want {
			t.Errorf("%+v: got %+v, want %+v", c.st, got, want)
		}
	}
	if got := capacity(&unix.Statfs_t{Blocks: math.MaxUint64, Bsize: 512}); got.Total != math.MaxInt64 {
		t.Errorf("2^64 blocks: got %+v", got)
	}
}
