//go:build kernelguest

package guest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// killsEnv is how often TestRestartKilled kills.
const killsEnv = "GUEST_KILLS"

// A strike is one way to kill an agent at work.
type strike struct {
	name string
	// begin starts what is to be interrupted and returns how to see it to its end.
	begin func() (finish func())
}

// TestRestartKilled kills the node process while filesystems on its devices are written to, over and over,
// at rest and in the middle of calls. Nobody may see an error.
func TestRestartKilled(t *testing.T) {
	kills := 20
	if s := os.Getenv(killsEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		kills = n
	}
	a := newAgent(t)
	plain := a.create("plain", "ext4", 128<<20, "")
	plain.mount()
	clone := a.create("clone", "ext4", 128<<20, plain.snapshot("base"))
	second := a.create("second", "xfs", 320<<20, "")
	all := []*volume{plain, clone, second}
	w := &workers{t: t}
	defer w.stop()
	for _, v := range all {
		if v != plain {
			v.mount()
		}
	}
	pulses := w.loadAll(all)
	checkThreads(t, a)

	seed := uint64(time.Now().UnixNano())
	random := rand.New(rand.NewPCG(seed, 0))
	t.Logf("%d kills, seed %d", kills, seed)
	strikes := strikesOf(a, plain, second)
	var p pauses
	for n := range kills {
		p.undisturbed(a, pulses)
		s := strikes[n%len(strikes)]
		finish := s.begin()
		time.Sleep(time.Duration(random.Int64N(int64(200 * time.Millisecond)))) // anywhere in the call
		begin := time.Now()
		a.kill()
		ended := time.Since(begin)
		a.start()
		if s.name == "takeover" {
			time.Sleep(time.Duration(random.Int64N(int64(1500 * time.Millisecond)))) // anywhere in the start
			a.kill()
			a.start()
		}
		a.restored(all)
		restart := time.Since(begin)
		finish()
		pause := p.add(a, pulses, restart)
		t.Logf("kill %d, %s: gone after %d ms, restarted after %d ms, pause of %d ms", n+1, s.name, ended.Milliseconds(), restart.Milliseconds(), pause.Milliseconds())
	}
	p.judge(t, 3*time.Second)

	for _, v := range all {
		if line := v.mountLine(); !strings.Contains(line, " rw,") {
			t.Errorf("%s is mounted as %q", v.name, line)
		}
		if reasons := v.health(); len(reasons) > 0 {
			t.Errorf("health of %s: %q", v.name, reasons)
		}
	}
	w.stop()
	for _, v := range all {
		v.unmount()
	}
	for _, v := range []*volume{clone, plain, second} {
		v.checkAndDelete()
	}
}

// strikesOf returns the ways to kill. Each call that is interrupted is repeated until it succeeds.
func strikesOf(a *agent, plain, second *volume) []strike {
	n := 0
	// during is a strike in the middle of call.
	during := func(name string, prepare func(), call func(context.Context) error) strike {
		return strike{name, func() func() {
			if prepare != nil {
				prepare()
			}
			done := make(chan error, 1)
			go func() { done <- a.try(name, call) }() // ends when the call has succeeded
			return func() {
				a.t.Helper()
				if err := <-done; err != nil {
					a.t.Fatal(err)
				}
			}
		}}
	}
	idle := strike{"at rest", func() func() { return func() {} }}
	var scratch *volume
	var snapshot string
	return []strike{
		idle,
		during("snapshot", func() { n++ }, func(ctx context.Context) (err error) {
			snapshot, err = plain.snapshotOnce(ctx, fmt.Sprintf("snapshot-%d", n))
			return err
		}),
		during("delete snapshot", nil, func(ctx context.Context) error { return a.deleteSnapshotOnce(ctx, snapshot) }),
		during("expand", func() { second.bytes += 8 << 20 }, func(ctx context.Context) error { return second.expandOnce(ctx) }),
		{"takeover", idle.begin},
		during("stage", func() { scratch = a.create(fmt.Sprintf("scratch-%d", n), "ext4", 32<<20, "") }, func(ctx context.Context) error { return scratch.stageOnce(ctx) }),
		during("unstage", nil, func(ctx context.Context) error { return scratch.unstageOnce(ctx) }),
		during("delete", nil, func(ctx context.Context) error { return scratch.deleteOnce(ctx) }),
	}
}

// checkThreads checks, from outside, that every thread of the process is an I/O flusher.
func checkThreads(t *testing.T, a *agent) {
	t.Helper()
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", a.cmd.Process.Pid))
	if err != nil || len(stats) < 3 {
		t.Fatalf("%d threads, %v", len(stats), err)
	}
	for _, path := range stats {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		flags, err := strconv.ParseUint(strings.Fields(rest)[6], 10, 64)
		if flusher := uint64(0x180000); err != nil || flags&flusher != flusher {
			t.Errorf("%s: flags %#x, %v: no I/O flusher", path, flags, err)
		}
	}
}
