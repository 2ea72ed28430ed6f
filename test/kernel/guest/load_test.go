//go:build kernelguest

package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"
)

// load writes to v and verifies what it wrote, over and over.
func (w *workers) load(v *volume, direct bool) {
	w.start("fio on "+v.name, func(ctx context.Context) error {
		for seed := 0; ctx.Err() == nil; seed++ {
			args := []string{"--name=load", "--thread", "--directory=" + v.target(), "--numjobs=2", "--size=6m", "--rw=randrw", "--bsrange=4k-64k", "--verify=crc32c",
				"--verify_state_save=0", "--do_verify=1", "--verify_fatal=1", fmt.Sprintf("--randseed=%d", seed), "--minimal"}
			if direct {
				args = append(args, "--direct=1", "--ioengine=libaio", "--iodepth=8")
			} else {
				args = append(args, "--ioengine=psync", "--fsync=16")
			}
			if out, err := exec.Command("fio", args...).CombinedOutput(); err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
		}
		return nil
	})
}

// A pulse writes and syncs a page over and over, and remembers how long that took at most.
type pulse struct {
	worst atomic.Int64 // ns, since it was last taken
	beats atomic.Int64
	since atomic.Int64 // ns since 1970: the beginning of the beat that is under way
}

// pulse starts a pulse on v.
func (w *workers) pulse(v *volume) *pulse {
	p := &pulse{}
	w.start("pulse on "+v.name, func(ctx context.Context) error {
		f, err := os.Create(filepath.Join(v.target(), "pulse"))
		if err != nil {
			return err
		}
		defer f.Close()
		page := make([]byte, 4096)
		for n := int64(0); ctx.Err() == nil; n++ {
			begin := time.Now()
			p.since.Store(begin.UnixNano())
			if _, err := f.WriteAt(page, n%256*4096); err != nil {
				return err
			}
			if err := f.Sync(); err != nil {
				return err
			}
			p.worst.Store(max(p.worst.Load(), int64(time.Since(begin))))
			p.beats.Add(1)
			time.Sleep(time.Millisecond) // it measures, it is no load
		}
		return nil
	})
	return p
}

// beaten waits until the pulse has beaten twice more, and returns the longest beat since the last call.
func (p *pulse) beaten(a *agent) time.Duration {
	a.t.Helper()
	deadline := time.Now().Add(patience)
	for n := p.beats.Load(); p.beats.Load() < n+2; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			a.t.Fatal("no I/O after a restart")
		}
	}
	return time.Duration(p.worst.Swap(0))
}
