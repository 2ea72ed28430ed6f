//go:build kernelguest

package guest

import (
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

// TestRestartMany kills a process with many volumes, each with a write under way. All must come back.
func TestRestartMany(t *testing.T) {
	a := newAgent(t)
	volumes := make([]*volume, many)
	devices := make([]*os.File, many)
	// The calls are made some at a time, as kubelet makes them.
	each := func(fn func(i int)) {
		var wg sync.WaitGroup
		slots := make(chan struct{}, 4)
		for i := range many {
			slots <- struct{}{}
			wg.Go(func() {
				fn(i)
				<-slots
			})
		}
		wg.Wait()
	}
	each(func(i int) {
		volumes[i] = a.create(fmt.Sprintf("many-%d", i), "", 4<<20, "")
		a.call("NodeStageVolume", volumes[i].stageOnce)
	})
	page := alignedPage()
	for i, v := range volumes {
		f, err := os.OpenFile(v.device(), os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		devices[i] = f
		if _, err := f.WriteAt(page, 0); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	a.kill()
	gone := time.Since(begin)
	a.start()
	back := make([]time.Duration, many)
	var wg sync.WaitGroup
	for i, f := range devices {
		wg.Go(func() {
			if _, err := f.WriteAt(page, 4096); err != nil {
				t.Errorf("volume %d: %v", i, err)
			}
			if err := f.Sync(); err != nil {
				t.Errorf("volume %d: %v", i, err)
			}
			back[i] = time.Since(begin)
		})
	}
	wg.Wait()
	last := time.Duration(0)
	for _, d := range back {
		last = max(last, d)
	}
	t.Logf("%d volumes: killed in %d ms, all back %d ms after the kill", many, gone.Milliseconds(), last.Milliseconds())
	for _, f := range devices {
		f.Close()
	}
	each(func(i int) {
		a.call("NodeUnstageVolume", volumes[i].unstageOnce)
	})
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
