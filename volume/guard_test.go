package volume

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// guarded opens a new pool with a guard.
func guarded(t *testing.T, g Guard) *Pool {
	t.Helper()
	p, err := Open(t.Context(), t.TempDir(), Options{Guard: g})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func capacityOf(t *testing.T, p *Pool) Capacity {
	t.Helper()
	c, err := p.Capacity()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sized asks for a volume of exactly n bytes.
func sized(name string, n int64) CreateRequest {
	return CreateRequest{Name: name, Size: SizeRange{Required: n}, Params: DefaultParams()}
}

// TestOvercommit: volumes are made until the bound, and not beyond, however
// many are made at once; deleting one makes room again.
func TestOvercommit(t *testing.T) {
	const unit = 64 << 20
	probe := guarded(t, Guard{})
	total := capacityOf(t, probe).Total
	p := guarded(t, Guard{Overcommit: 10.5 * unit / float64(total)})
	var made, refused atomic.Int32
	var all sync.WaitGroup
	for i := range 20 {
		all.Go(func() {
			switch _, err := p.Create(context.Background(), sized(fmt.Sprint("v", i), unit)); {
			case err == nil:
				made.Add(1)
			case errors.Is(err, ErrNoSpace):
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	// At once: one that is in the index may still count as promised.
	if made.Load() > 10 {
		t.Fatalf("%d volumes were made, the bound is 10", made.Load())
	}
	for i := range 20 { // one after the other: up to the bound exactly
		_, err := p.Create(t.Context(), sized(fmt.Sprint("v", i), unit))
		if err != nil && !errors.Is(err, ErrNoSpace) {
			t.Error(err)
		}
	}
	ids := p.IDs()
	if len(ids) != 10 {
		t.Fatalf("there are %d volumes, the bound is 10", len(ids))
	}
	if room := p.Room(capacityOf(t, p)); room != unit/2 {
		t.Errorf("there is room for %d bytes, want %d", room, unit/2)
	}
	if _, err := p.Expand(t.Context(), ids[0], SizeRange{Required: 2 * unit}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("expand beyond the bound: %v", err)
	}
	if v, err := p.Expand(t.Context(), ids[0], SizeRange{Required: unit + unit/2}); err != nil || v.Size != unit+unit/2 {
		t.Errorf("expand within the bound: %v, %v", v, err)
	}
	if err := p.Delete(t.Context(), ids[1]); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(t.Context(), sized("again", unit)); err != nil {
		t.Errorf("after a deletion: %v", err)
	}
}

func TestFullPoolRefusesVolumes(t *testing.T) {
	probe := guarded(t, Guard{})
	c := capacityOf(t, probe)
	used := float64(c.Total-c.Available) / float64(c.Total)
	if used == 0 {
		t.Fatal("the file system of the test's directory is empty to the last byte; use another TMPDIR")
	}
	p := guarded(t, Guard{RefuseAt: used / 2, WarnAt: used / 4})
	c = capacityOf(t, p)
	if _, err := p.Create(t.Context(), sized("v", 1<<20)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("create in a full pool: %v", err)
	}
	if room := p.Room(c); room != 0 || p.Level(c) != LevelRefuse {
		t.Errorf("room %d at level %d", room, p.Level(c))
	}
}

// TestStop: writes that need space get ENOSPC, those in place go on, and
// snapshots and volumes can be deleted. When there is space again all goes on.
func TestStop(t *testing.T) {
	p := guarded(t, Guard{StopAt: 1})
	v, err := p.Create(t.Context(), sized("v", 64<<20))
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Open(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	data := make([]byte, 1<<20)
	for i := range data {
		data[i] = 7
	}
	if _, err := d.Image.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	p.guard.left.Store(1 << 20) // as after a look at an almost full pool
	var written int64
	for off := int64(8 << 20); off < 32<<20; off += 1 << 20 {
		if _, err = d.Image.WriteAt(data, off); err != nil {
			break
		}
		written += 1 << 20
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d bytes: %v: want ENOSPC", written, err)
	}
	if written > 1<<20 {
		t.Errorf("%d bytes were allocated, 1 MiB was left", written)
	}
	if _, err := d.Image.WriteAt(data, 0); err != nil {
		t.Errorf("write in place: %v", err)
	}
	if err := d.Image.Flush(); err != nil {
		t.Errorf("flush: %v", err)
	}
	if p.Refused() == 0 || !p.Stopped() {
		t.Errorf("%d refusals were counted, stopped %v", p.Refused(), p.Stopped())
	}
	snap, err := p.CreateSnapshot(t.Context(), "s", v.ID)
	if err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	if _, err := d.Image.WriteAt(data, 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write that must copy: %v", err)
	}
	if err := p.DeleteSnapshot(t.Context(), snap.ID); err != nil {
		t.Errorf("delete the snapshot: %v", err)
	}
	if err := p.look(); err != nil { // the real file system has room
		t.Fatal(err)
	}
	if !p.Stopped() {
		t.Error("the refusals of a moment ago are forgotten")
	}
	if p.guard.refusedAt.Add(-int64(stoppedFor)); p.Stopped() {
		t.Error("it counts as stopped with room again")
	}
	if _, err := d.Image.WriteAt(data, 16<<20); err != nil {
		t.Errorf("with room again: %v", err)
	}
	got := make([]byte, 1<<20)
	if _, err := d.Image.ReadAt(got, 16<<20); err != nil || string(got) != string(data) {
		t.Errorf("read back: %v", err)
	}
	if err := d.Image.Flush(); err != nil {
		t.Error(err)
	}
}

// TestAwaitRoom: a write that waits is let go by the first look that finds
// room, and otherwise by the end of its context or of the pool.
func TestAwaitRoom(t *testing.T) {
	p := guarded(t, Guard{StopAt: 1, Pause: time.Hour})
	wait := func(ctx context.Context) <-chan error {
		done := make(chan error, 1)
		go func() { done <- p.AwaitRoom(ctx) }() // ends with ctx at the latest
		return done
	}
	waits := func() { // until somebody waits for the next look
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			p.guard.mu.Lock()
			waiting := p.guard.looked != nil
			p.guard.mu.Unlock()
			if waiting {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("nobody waits for room")
			}
		}
	}
	p.guard.left.Store(-1)
	if err := p.admit(4096); !errors.Is(err, syscall.ENOSPC) || p.Refused() != 0 {
		t.Fatalf("admit in a full pool: %v, %d refusals were counted", err, p.Refused())
	}
	done := wait(t.Context())
	waits()
	full := p.guard.opts.StopAt
	p.guard.opts.StopAt = 1e-9 // a look at a full file system
	if err := p.look(); err != nil {
		t.Fatal(err)
	}
	waits() // still
	p.guard.opts.StopAt = full
	if err := p.look(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || p.Refused() != 0 {
		t.Errorf("with room again: %v, %d refusals were counted", err, p.Refused())
	}
	ctx, cancel := context.WithCancel(t.Context())
	done = wait(ctx)
	waits()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || p.Refused() != 0 {
		t.Errorf("after the end of its context: %v, %d refusals were counted before the write gave up", err, p.Refused())
	}
	if p.Refuse(); p.Refused() != 1 {
		t.Errorf("%d refusals were counted: want 1", p.Refused())
	}
}

// TestWatch: the watcher notices that there is room again.
func TestWatch(t *testing.T) {
	p := guarded(t, Guard{StopAt: 1})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { p.Watch(ctx); close(done) }() // ends with ctx
	p.guard.left.Store(-1)
	for deadline := time.Now().Add(time.Minute); p.guard.left.Load() <= 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the watcher has not looked in a minute")
		}
	}
	cancel()
	<-done
}

func TestGuardIsChecked(t *testing.T) {
	for _, g := range []Guard{{WarnAt: -0.1}, {RefuseAt: 1.1}, {StopAt: math.NaN()}, {Overcommit: -1}, {Overcommit: math.Inf(1)},
		{StopAt: 1, Pause: -1}, {StopAt: 1, Pause: 25 * time.Hour}, {Pause: time.Second}} {
		if err := g.Validate(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%+v: %v", g, err)
		}
		if _, err := Open(t.Context(), t.TempDir(), Options{Guard: g}); !errors.Is(err, ErrInvalid) {
			t.Errorf("open with %+v: %v", g, err)
		}
	}
	c := Capacity{Total: 100, Available: 10}
	for g, want := range map[Guard]Level{
		{}:            LevelOK,
		{WarnAt: 0.9}: LevelWarn,
		{WarnAt: 0.5, RefuseAt: 0.91, StopAt: 0.95}: LevelWarn,
		{WarnAt: 0.5, RefuseAt: 0.8, StopAt: 0.95}:  LevelRefuse,
		{WarnAt: 0.5, RefuseAt: 0.8, StopAt: 0.9}:   LevelStop,
		{StopAt: 0.1}: LevelStop,
	} {
		if got := g.level(c); got != want {
			t.Errorf("%+v: level %d, want %d", g, got, want)
		}
	}
}

func TestSpace(t *testing.T) {
	p := guarded(t, Guard{})
	v, err := p.Create(t.Context(), sized("v", 64<<20))
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Open(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	data := make([]byte, 4<<20)
	for i := range data {
		data[i] = 7
	}
	if _, err := d.Image.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Image.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.CreateSnapshot(t.Context(), "s", v.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Create(t.Context(), CreateRequest{Name: "clone", Params: DefaultParams(), Source: Source{Volume: v.ID}}); err != nil {
		t.Fatal(err)
	}
	s, err := p.Space()
	if err != nil {
		t.Fatal(err)
	}
	if s.Provisioned != 128<<20 || s.Snapshots != 1 || len(s.Volumes) != 2 || s.Tombstones != 0 {
		t.Errorf("%+v", s)
	}
	for _, v := range s.Volumes {
		if large := v.Allocated >= 4<<20; large != v.Source.Empty() || v.Allocated <= 0 {
			t.Errorf("volume %s takes %d bytes", v.Name, v.Allocated)
		}
	}
}

// A reservation leaves what the guard keeps, whatever is asked for; a clone
// reserves nothing, so that nothing is asked of the pool for it.
func TestReservationLeavesRoom(t *testing.T) {
	p := openPool(t, newFilesystem(t, "xfs"), Options{Guard: Guard{RefuseAt: 0.95, StopAt: 0.98}})
	defer p.Close()
	reserve := func(name string, size int64, source Source) error {
		req := sized(name, size)
		req.Params.Preallocation, req.Source = qcow2.PreallocationFalloc, source
		if name == "tables" {
			req.Params.Preallocation, req.Params.ClusterSize = qcow2.PreallocationMetadata, minClusterSize
		}
		_, err := p.Create(t.Context(), req)
		return err
	}
	c := capacityOf(t, p)
	thin, err := p.Create(t.Context(), sized("thin", c.Total))
	if err != nil {
		t.Fatal(err)
	}
	if err := reserve("all", (c.Available-8<<20)&^(SizeUnit-1), Source{}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("all that is left: got %v, want ErrNoSpace", err)
	}
	if err := reserve("tables", 1<<40, Source{}); !errors.Is(err, ErrNoSpace) {
		t.Errorf("tables of 2.5 GiB: got %v, want ErrNoSpace", err)
	}
	if err := reserve("clone", c.Total, Source{Volume: thin.ID}); err != nil {
		t.Errorf("a clone: %v", err)
	}
	if err := reserve("most", c.Available-c.Total/15, Source{}); err != nil {
		t.Errorf("what may be taken: %v", err)
	}
	if level := p.Level(capacityOf(t, p)); level >= LevelStop {
		t.Errorf("the pool is at level %d after a reservation", level)
	}
}

// Reservations that are made at once leave what the guard keeps, all together.
func TestReservationsAtOnceLeaveRoom(t *testing.T) {
	begun, proceed := make(chan struct{}), make(chan struct{})
	var seen atomic.Bool
	step := func(what string) error {
		if strings.HasPrefix(what, "mkdir "+incomingDir+"/") && !seen.Swap(true) {
			close(begun)
			<-proceed
		}
		return nil
	}
	p := openPool(t, newFilesystem(t, "xfs"), Options{Guard: Guard{RefuseAt: 0.95, StopAt: 0.98}, step: step})
	defer p.Close()
	size := p.guard.opts.reservable(capacityOf(t, p)) / 3 * 2 &^ (SizeUnit - 1)
	reserve := func(name string) error {
		req := sized(name, size)
		req.Params.Preallocation = qcow2.PreallocationFalloc
		_, err := p.Create(t.Context(), req)
		return err
	}
	made := make(chan error, 1)
	go func() { made <- reserve("one") }()
	<-begun
	if err := reserve("two"); !errors.Is(err, ErrNoSpace) {
		t.Errorf("beside one of the same size: got %v, want ErrNoSpace", err)
	}
	close(proceed)
	if err := <-made; err != nil {
		t.Errorf("one: %v", err)
	}
	if level := p.Level(capacityOf(t, p)); level >= LevelRefuse {
		t.Errorf("the pool is at level %d after the reservations", level)
	}
	if p.guard.reserved != 0 {
		t.Errorf("%d bytes are still being reserved", p.guard.reserved)
	}
}

// A pool whose file system takes no writes has no room, and says why.
func TestReadOnlyPool(t *testing.T) {
	dir := newFilesystem(t, "xfs")
	p := openPool(t, dir, Options{})
	defer p.Close()
	if err := p.unlock(); err != nil { // it is open for writing
		t.Fatal(err)
	}
	p.lock = nil
	if c := capacityOf(t, p); c.ReadOnly || p.Room(c) == 0 {
		t.Fatalf("%+v before", c)
	}
	if err := unix.Mount("", filepath.Dir(dir), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if c := capacityOf(t, p); !c.ReadOnly || p.Room(c) != 0 {
		t.Errorf("%+v, room for %d bytes", c, p.Room(c))
	}
	_, err := p.Create(t.Context(), sized("v", 1<<20))
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "read-only") || !strings.Contains(err.Error(), dir) {
		t.Errorf("create: %v", err)
	}
}

// A clone that is refused takes no snapshot of its source, and does not freeze it.
func TestRefusedCloneLeavesItsSourceAlone(t *testing.T) {
	quiesce := func(_ context.Context, cut func()) error {
		t.Error("the source is frozen")
		cut()
		return nil
	}
	refused := func(p *Pool, source string, want error) {
		t.Helper()
		_, err := p.Create(t.Context(), CreateRequest{Name: "refused", Params: DefaultParams(), Source: Source{Volume: source}, Quiesce: quiesce})
		if !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	full := guarded(t, Guard{RefuseAt: 1})
	v, err := full.Create(t.Context(), sized("v", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	full.guard.opts.RefuseAt = 1e-9
	refused(full, v.ID, ErrNoSpace)

	deep := guarded(t, Guard{})
	if v, err = deep.Create(t.Context(), sized("0", 1<<20)); err != nil {
		t.Fatal(err)
	}
	for i := range maxChainDepth {
		v = clone(t, deep, fmt.Sprint(i+1), Source{Volume: v.ID}, CloneLinked)
	}
	refused(deep, v.ID, ErrTooDeep)
	if err := deep.checkDepth(v.ID); err == nil || !strings.Contains(err.Error(), v.ID) {
		t.Errorf("%v does not name %s", err, v.ID)
	}
}
