//go:build kernelguest

package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// loadAll loads all, by turns past the page cache and through it, and returns the pulse of each.
func (w *workers) loadAll(all []*volume) []*pulse {
	var pulses []*pulse
	for i, v := range all {
		w.load(v, i%2 == 0)
		pulses = append(pulses, w.pulse(v))
	}
	return pulses
}

// load writes to v and verifies what it wrote, over and over.
func (w *workers) load(v *volume, direct bool) {
	w.start("fio on "+v.name, func(ctx context.Context) error {
		for seed := 0; ctx.Err() == nil; seed++ {
			args := []string{"--name=load", "--thread", "--directory=" + v.target(), "--numjobs=1", "--size=8m", "--rw=randrw", "--bsrange=4k-64k", "--verify=crc32c",
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

// The pauses of one test: how long I/O stood still each time that the process was replaced.
type pauses struct {
	all    []time.Duration
	excess []time.Duration // of each, over the time that there was no process
	calm   time.Duration   // the longest beat while nothing happened
}

// undisturbed takes what the pulses have measured since they were last asked, when nothing had happened.
func (p *pauses) undisturbed(a *agent, pulses []*pulse) {
	for _, one := range pulses {
		p.calm = max(p.calm, one.beaten(a))
	}
}

// add takes what the pulses have measured over a replacement, with no process for as long as gap.
func (p *pauses) add(a *agent, pulses []*pulse, gap time.Duration) time.Duration {
	pause := time.Duration(0)
	for _, one := range pulses {
		pause = max(pause, one.beaten(a))
	}
	p.all, p.excess = append(p.all, pause), append(p.excess, pause-gap)
	return pause
}

// judge prints the pauses and compares what they had beyond the gaps with most. A beat takes as long as the
// machine makes it take when nothing happens; the machine may stop for a moment just then, so it is the
// median that counts, and three times as much for each.
func (p *pauses) judge(t *testing.T, most time.Duration) {
	t.Helper()
	slices.Sort(p.all)
	slices.Sort(p.excess)
	n := len(p.all)
	median, worst := p.excess[n/2], p.excess[n-1]
	t.Logf("%d pauses: median %d ms, most %d ms; beyond the time without a process: median %d ms, most %d ms; the longest write and sync otherwise: %d ms",
		n, p.all[n/2].Milliseconds(), p.all[n-1].Milliseconds(), median.Milliseconds(), worst.Milliseconds(), p.calm.Milliseconds())
	if median > most+p.calm || worst > 3*(most+p.calm) {
		t.Errorf("I/O stood still for more than %s beyond the time without a process", most)
	}
}
