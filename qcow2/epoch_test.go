package qcow2_test

import (
	"bytes"
	"sync"
	"testing"

	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

// A stallingFile holds up the next read or write of data at one offset, once.
type stallingFile struct {
	*storagetest.Disk
	mu      sync.Mutex
	off     int64         // guarded by mu; -1: none
	stalled chan struct{} // closed when the operation stands
	resume  chan struct{} // closed to let it go on
}

// Offsets that stand for a Datasync and for a Punch anywhere.
const (
	syncOff  = -2
	punchOff = -3
)

func (f *stallingFile) stallAt(off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.off, f.stalled, f.resume = off, make(chan struct{}), make(chan struct{})
}

func (f *stallingFile) pass(off int64) {
	f.mu.Lock()
	hit := f.off == off
	if hit {
		f.off = -1
	}
	stalled, resume := f.stalled, f.resume
	f.mu.Unlock()
	if hit {
		close(stalled)
		<-resume
	}
}

func (f *stallingFile) ReadAt(p []byte, off int64) (int, error) {
	f.pass(off)
	return f.Disk.ReadAt(p, off)
}

func (f *stallingFile) WriteAt(p []byte, off int64) (int, error) {
	f.pass(off)
	return f.Disk.WriteAt(p, off)
}

func (f *stallingFile) Datasync() error {
	f.pass(syncOff)
	return f.Disk.Datasync()
}

func (f *stallingFile) Punch(off, n int64) error {
	f.pass(punchOff)
	return f.Disk.Punch(off, n)
}

const stallCluster = 4096

// newStalling returns an image with one written cluster, and where that lies.
func newStalling(t *testing.T) (f *stallingFile, im *qcow2.Image, host int64) {
	t.Helper()
	f = &stallingFile{Disk: storagetest.NewDisk(), off: -1}
	if err := qcow2.Create(t.Context(), f, 1<<20, qcow2.CreateOptions{ClusterSize: stallCluster}); err != nil {
		t.Fatal(err)
	}
	im, err := qcow2.Open(t.Context(), f, qcow2.Options{PassDiscard: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := im.WriteAt(bytes.Repeat([]byte{'a'}, stallCluster), 0); err != nil {
		t.Fatal(err)
	}
	ext, err := im.BlockStatus(t.Context(), 0, stallCluster)
	if err != nil || ext.HostOff < 0 {
		t.Fatalf("status %+v, %v", ext, err)
	}
	return f, im, ext.HostOff
}

// churn discards the cluster and writes elsewhere, with flushes in between, so
// that its host cluster is reused if anything lets it be.
func churn(t *testing.T, im *qcow2.Image) {
	t.Helper()
	if err := im.Discard(0, stallCluster); err != nil {
		t.Fatal(err)
	}
	for i := int64(1); i < 40; i++ {
		if i%4 == 1 {
			if err := im.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := im.WriteAt(bytes.Repeat([]byte{'x'}, stallCluster), i*stallCluster); err != nil {
			t.Fatal(err)
		}
	}
}

// A read that knows a host cluster returns what the address held, although the
// cluster is freed meanwhile: never the bytes of another address (E8, P5).
func TestReadOfFreedCluster(t *testing.T) {
	f, im, host := newStalling(t)
	f.stallAt(host)
	got := make([]byte, stallCluster)
	done := make(chan error)
	go func() {
		_, err := im.ReadAt(got, 0)
		done <- err
	}()
	<-f.stalled
	churn(t, im)
	close(f.resume)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if want := bytes.Repeat([]byte{'a'}, stallCluster); !bytes.Equal(got, want) {
		t.Errorf("read %q…, want %q…", got[:8], want[:8])
	}
}

// A write in place that was under way when its cluster was freed does not reach
// what the cluster holds next (E8, P5).
func TestWriteToFreedCluster(t *testing.T) {
	f, im, host := newStalling(t)
	f.stallAt(host)
	done := make(chan error)
	go func() {
		_, err := im.WriteAt(bytes.Repeat([]byte{'b'}, stallCluster), 0)
		done <- err
	}()
	<-f.stalled
	churn(t, im)
	close(f.resume)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, stallCluster)
	for i := int64(1); i < 40; i++ {
		if _, err := im.ReadAt(got, i*stallCluster); err != nil {
			t.Fatal(err)
		}
		if want := bytes.Repeat([]byte{'x'}, stallCluster); !bytes.Equal(got, want) {
			t.Fatalf("cluster %d holds %q…, want %q…", i, got[:8], want[:8])
		}
	}
}

// A cluster that is freed while a flush is under way waits for the next: the one
// under way may have copied the table before (E3, E8).
func TestFreedClusterWaitsForItsPass(t *testing.T) {
	f, im, host := newStalling(t)
	if err := im.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := im.WriteAt(make([]byte, stallCluster), 50*stallCluster); err != nil {
		t.Fatal(err) // something for the flush to do
	}
	f.stallAt(syncOff)
	done := make(chan error)
	go func() { done <- im.Flush() }()
	<-f.stalled
	if err := im.Discard(0, stallCluster); err != nil {
		t.Fatal(err)
	}
	close(f.resume)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	for i := int64(1); i < 40; i++ {
		if _, err := im.WriteAt(make([]byte, stallCluster), i*stallCluster); err != nil {
			t.Fatal(err)
		}
		ext, err := im.BlockStatus(t.Context(), i*stallCluster, stallCluster)
		if err != nil {
			t.Fatal(err)
		}
		if ext.HostOff == host {
			t.Fatalf("host cluster %#x is in use again, but the file may still map address 0 to it", host)
		}
	}
}

// A cluster cannot be allocated while it is being punched: the punch would take
// what is written there (E8).
func TestFreedClusterIsPunchedFirst(t *testing.T) {
	f, im, _ := newStalling(t)
	if err := im.Discard(0, stallCluster); err != nil {
		t.Fatal(err)
	}
	f.stallAt(punchOff)
	done := make(chan error)
	go func() { done <- im.Flush() }()
	<-f.stalled
	want := bytes.Repeat([]byte{'x'}, stallCluster)
	for i := int64(1); i < 40; i++ {
		if _, err := im.WriteAt(want, i*stallCluster); err != nil {
			t.Fatal(err)
		}
	}
	close(f.resume)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, stallCluster)
	for i := int64(1); i < 40; i++ {
		if _, err := im.ReadAt(got, i*stallCluster); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("cluster %d holds %q…, want %q…", i, got[:8], want[:8])
		}
	}
}

// Freed clusters come back once the requests that knew them are gone.
func TestFreedClusterIsReused(t *testing.T) {
	_, im, host := newStalling(t)
	churn(t, im)
	ext, err := im.BlockStatus(t.Context(), stallCluster, 39*stallCluster)
	for at := int64(stallCluster); err == nil && at < 40*stallCluster; at = ext.End() {
		ext, err = im.BlockStatus(t.Context(), at, 40*stallCluster-at)
		if ext.HostOff <= host && host < ext.HostOff+ext.Len {
			return
		}
	}
	t.Errorf("host cluster %#x was not reused (%v)", host, err)
}
