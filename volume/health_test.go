package volume

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/panics"
	"csi-qcow2/qcow2"
)

// unsyncable is a file whose syncs fail once told to.
type unsyncable struct {
	qcow2.File
	broken *atomic.Bool
}

func (f unsyncable) Datasync() error {
	if f.broken.Load() {
		return syscall.EIO
	}
	return f.File.Datasync()
}

// An image that fails while it is open shows in the volume's health, until it
// has been closed and opened again (P6).
func TestHealthOfFailedImage(t *testing.T) {
	tables, err := cache.New(cache.Options{Bytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	var broken atomic.Bool
	pool, err := Open(t.Context(), t.TempDir(), Options{Cache: tables,
		wrapFile: func(f qcow2.File) qcow2.File { return unsyncable{f, &broken} }})
	if err != nil {
		t.Fatal(err)
	}
	v, err := pool.Create(t.Context(), CreateRequest{Name: "pvc-1", Size: SizeRange{Required: 64 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	wantHealth := func(want error) {
		t.Helper()
		problem, err := pool.Health(v.ID)
		if err != nil || !errors.Is(problem, want) {
			t.Fatalf("health %v, %v, want %v", problem, err, want)
		}
	}
	d, err := pool.Open(t.Context(), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantHealth(nil)
	broken.Store(true)
	if _, err := d.Image.WriteAt([]byte("data"), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Image.Flush(); !errors.Is(err, syscall.EIO) {
		t.Fatalf("flush: %v, want an I/O error", err)
	}
	broken.Store(false)
	if err := d.Image.Flush(); !errors.Is(err, qcow2.ErrFailed) {
		t.Fatalf("second flush: %v, want ErrFailed", err)
	}
	wantHealth(qcow2.ErrFailed)
	if err := d.Close(); err == nil {
		t.Error("close of a failed image says nothing")
	}
	if d, err = pool.Open(t.Context(), v.ID); err != nil {
		t.Fatal(err)
	}
	wantHealth(nil)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(pool.Close(), tables.Close()); err != nil {
		t.Fatal(err)
	}
}

// panicking is a file whose reads panic, as a bug in what reads them would.
type panicking struct{ qcow2.File }

func (panicking) ReadAt([]byte, int64) (int, error) { panic("bug") }

// An image that makes the program panic when it is opened costs its own volume, and
// those that read it, not the process.
func TestPanicWhileOpening(t *testing.T) {
	var broken atomic.Bool
	p := openPool(t, t.TempDir(), Options{wrapFile: func(f qcow2.File) qcow2.File {
		if broken.Load() {
			return panicking{f}
		}
		return f
	}})
	v, other := create(t, p, "v", Source{}), create(t, p, "other", Source{})
	broken.Store(true)
	var caught *panics.Error
	if _, err := p.Open(t.Context(), v.ID); !errors.As(err, &caught) {
		t.Fatalf("open: %v, want the panic", err)
	}
	broken.Store(false)
	if problem, err := p.Health(v.ID); err != nil || !errors.As(problem, &caught) {
		t.Errorf("health: %v, %v, want the panic", problem, err)
	}
	write(t, p, other.ID, 0, 1, 1<<20)
	wantBytes(t, p, other.ID, 0, 1, 1<<20)
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}
