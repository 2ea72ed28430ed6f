//go:build kernelguest

package guest

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// many is how many volumes one node has in TestRestartMany.
const many = 64

// manyMost is how long it may take until all are back. A machine that is too slow for that needs long for
// everything: half as long as staging them took.
const manyMost = 10 * time.Second

// TestRestartMany kills a process with many volumes, each with writes under way. All must come back, and soon.
func TestRestartMany(t *testing.T) {
	a := newAgent(t)
	volumes := make([]*volume, many)
	devices := make([]*os.File, many)
	// The calls are made some at a time, as kubelet makes them.
	each := func(from int, fn func(i int)) {
		var wg sync.WaitGroup
		slots := make(chan struct{}, 4)
		for i := from; i < many; i++ {
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				fn(i)
			})
		}
		wg.Wait()
	}
	stage := func(i int) {
		volumes[i] = a.create(fmt.Sprintf("many-%d", i), "", 4<<20, "")
		a.call("NodeStageVolume", volumes[i].stageOnce)
		f, err := os.OpenFile(volumes[i].device(), os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Error(err)
			return
		}
		devices[i] = f
	}
	defer func() {
		for _, f := range devices {
			f.Close() // an error for those that are closed already
		}
	}()
	stage(0)
	if t.Failed() {
		return
	}
	one := comeBack(a, devices[:1])
	begin := time.Now()
	each(1, stage)
	staging := time.Since(begin)
	if t.Failed() {
		return
	}
	all := comeBack(a, devices)
	t.Logf("back after a kill: one volume in %d ms, %d volumes in %d ms, which took %d ms to be staged", one.Milliseconds(), many, all.Milliseconds(), staging.Milliseconds())
	if all > max(manyMost, staging/2) {
		t.Errorf("%d volumes are back after %s, want %s", many, all, manyMost)
	}
	for _, f := range devices {
		f.Close()
	}
	each(0, func(i int) { a.call("NodeUnstageVolume", volumes[i].unstageOnce) })
}

// comeBack kills a while a page is written to each device, starts it again, and returns how long after the kill
// each device has taken another page and has synced it.
func comeBack(a *agent, devices []*os.File) time.Duration {
	a.t.Helper()
	page := alignedPage()
	killed := make(chan struct{})
	var wg sync.WaitGroup
	for i, f := range devices {
		wg.Go(func() { // ends when the device is back
			_, before := f.WriteAt(page, 0)
			<-killed
			_, after := f.WriteAt(page, 4096)
			if err := errors.Join(before, after, f.Sync()); err != nil {
				a.t.Errorf("volume %d: %v", i, err)
			}
		})
	}
	begin := time.Now()
	a.kill()
	close(killed)
	a.start()
	wg.Wait()
	return time.Since(begin)
}

// alignedPage returns a page of ones where direct I/O wants it.
func alignedPage() []byte {
	b := make([]byte, 2*4096)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) & 4095)
	page := b[skip : skip+4096]
	for i := range page {
		page[i] = 1
	}
	return page
}
