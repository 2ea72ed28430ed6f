package volume

import (
	"errors"
	"sync/atomic"
	"syscall"
	"testing"

	"csi-qcow2/cache"
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
