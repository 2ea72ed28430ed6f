package meter_test

import (
	"errors"
	"sync"
	"syscall"
	"testing"
	"time"

	"csi-qcow2/internal/meter"
	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

func TestBackendConforms(t *testing.T) {
	nbdtest.TestBackend(t, func(*testing.T) nbdexport.Backend {
		return meter.NewBackend(nbdtest.NewMemory(5<<20), new(meter.Meter))
	})
}

// TestCounts: many goroutines, and nothing is lost.
func TestCounts(t *testing.T) {
	m := new(meter.Meter)
	b := meter.NewBackend(nbdtest.NewMemory(1<<20), m)
	const workers, each = 8, 500
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			p := make([]byte, 4096)
			for i := range each {
				off := int64((w*each + i) % 256 * 4096)
				for _, err := range []error{
					func() error { _, err := b.WriteAt(p, off); return err }(),
					func() error { _, err := b.ReadAt(p, off); return err }(),
					b.WriteZeroes(off, 4096, true), b.Discard(off, 4096), b.Flush(),
				} {
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	for k := range meter.Kinds {
		s := m.Stats(k)
		wantBytes := uint64(workers * each * 4096)
		if k == meter.Flush {
			wantBytes = 0
		}
		var times uint64
		for _, n := range s.Times {
			times += n
		}
		if s.Requests != workers*each || s.Begun != s.Requests || times != s.Requests || s.Bytes != wantBytes || s.Errors != 0 || s.Time <= 0 {
			t.Errorf("%s: %+v", k, s)
		}
	}
	if d := m.Depth(); d != 0 {
		t.Errorf("depth %d with nothing under way", d)
	}
}

// A stuck backend waits in every read, and then fails.
type stuck struct {
	nbdexport.Backend
	entered, leave chan struct{}
}

func (s stuck) ReadAt([]byte, int64) (int, error) {
	s.entered <- struct{}{}
	<-s.leave
	return 0, errors.New("x")
}

func TestDepthAndErrors(t *testing.T) {
	m := new(meter.Meter)
	s := stuck{nbdtest.NewMemory(1 << 20), make(chan struct{}), make(chan struct{})}
	b := meter.NewBackend(s, m)
	var all sync.WaitGroup
	for i := range 3 {
		all.Go(func() { b.ReadAt(make([]byte, 1), int64(i)<<12) })
		<-s.entered
	}
	if d := m.Depth(); d != 3 {
		t.Errorf("depth %d with 3 under way", d)
	}
	close(s.leave)
	all.Wait()
	if got := m.Stats(meter.Read); m.Depth() != 0 || got.Errors != 3 || got.Requests != 3 {
		t.Errorf("depth %d, %+v: want 0 and 3 errors", m.Depth(), got)
	}
}

// plain has none of the optional methods of a backend.
type plain struct{ nbdexport.Backend }

func TestOptionalMethods(t *testing.T) {
	b := meter.NewBackend(plain{nbdtest.NewMemory(1 << 20)}, new(meter.Meter))
	if err := b.WriteZeroesFast(0, 512, true); !errors.Is(err, syscall.EOPNOTSUPP) {
		t.Errorf("a fast zero: %v", err)
	}
	if b.SparseReads() || b.WantsAligned() || b.Cache(0, 1) != nil {
		t.Error("the meter promises what its backend does not")
	}
}

func TestBounds(t *testing.T) {
	if meter.Bound(0) != 32768*time.Nanosecond {
		t.Errorf("the first bound is %s", meter.Bound(0))
	}
	if last := meter.Bound(meter.Buckets - 2); last < 2*time.Second {
		t.Errorf("the last bound is %s", last)
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	b := meter.NewBackend(nbdtest.NewMemory(1<<20), new(meter.Meter))
	p := make([]byte, 512)
	if n := testing.AllocsPerRun(1000, func() { b.ReadAt(p, 0); b.WriteAt(p, 4096); b.Flush() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkRead compares reads with and without counting.
func BenchmarkRead(b *testing.B) {
	memory := nbdtest.NewMemory(64 << 20)
	for name, backend := range map[string]nbdexport.Backend{"plain": memory, "counted": meter.NewBackend(memory, new(meter.Meter))} {
		b.Run(name, func(b *testing.B) {
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, 4096)
				for off := int64(0); pb.Next(); off = (off + 4096) % (64 << 20) {
					backend.ReadAt(p, off)
				}
			})
		})
	}
}
