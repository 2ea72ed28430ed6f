package qcow2_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"csi-qcow2/cache"
	"csi-qcow2/internal/qemutest"
	"csi-qcow2/internal/storagetest"
	"csi-qcow2/qcow2"
)

var (
	crashStates = flag.Int("crash", scaled(4000), "after-crash states that TestPowerLoss checks")
	crashQEMU   = flag.Int("crash-qemu", 100, "how many of them QEMU judges, too")
)

// crashConfigs are the images of the crash tests: geometries with which a few
// operations touch and grow every kind of table.
var crashConfigs = []crashConfig{
	{name: "512", size: 96 << 10, create: qcow2.CreateOptions{ClusterSize: 512}},
	{name: "4k-punch", size: 128 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 4096}},
	{name: "64k", size: 512 << 10, create: qcow2.CreateOptions{ClusterSize: 65536}},
	{name: "512-refcount1", size: 64 << 10, create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 1}},
	{name: "512-refcount64-punch", size: 64 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64}},
	{name: "1k-lazy-punch", size: 128 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 1024, LazyRefcounts: true}},
	{name: "4k-backing", size: 128 << 10, backing: true, create: qcow2.CreateOptions{ClusterSize: 4096}},
	{name: "512-backing-punch", size: 64 << 10, backing: true, pass: true, create: qcow2.CreateOptions{ClusterSize: 512}},
	{name: "2k-punch-prelude", size: 128 << 10, pass: true, prelude: 64 << 10, create: qcow2.CreateOptions{ClusterSize: 2048, RefcountBits: 4}},
	{name: "v2", size: 96 << 10, create: qcow2.CreateOptions{ClusterSize: 1024, Version: 2}},
}

// figures counts what the crash tests saw.
type figures struct {
	states, dirty, leaky, qemu, nested int
}

// A crashRun checks after-crash states of one history after another.
type crashRun struct {
	t   *testing.T
	mc  *cache.Cache
	rng *rand.Rand
	figures
}

// TestPowerLoss cuts the power at every event of random histories and opens
// what may be left: nothing flushed is lost, nothing foreign appears (P2), the
// image opens and is not corrupt (P3), snapshots are exact (P4).
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	run := crashRun{t: t, mc: newCache(t, 64<<10), rng: newRand(t)}
	const perHistory = 250
	for i := 0; run.states < *crashStates && !t.Failed(); i++ {
		c := crashConfigs[i%len(crashConfigs)]
		ops := crashOps(run.rng, 6+run.rng.IntN(18), max(c.create.ClusterSize, 512), c.create.RefcountBits != 1)
		run.history(c, ops, min(perHistory, *crashStates-run.states))
	}
	if t.Failed() {
		return // the zeroes below would not be true
	}
	t.Logf("power loss: %d states, %d of them with the dirty bit, %d with leaks, %d judged by QEMU, %d crashes during recovery: lost sectors 0, foreign bytes 0, corruptions 0",
		run.states, run.dirty, run.leaky, run.qemu, run.nested)
}

// history records ops and checks up to limit of its states.
func (r *crashRun) history(c crashConfig, ops []op, limit int) {
	r.t.Helper()
	h, err := record(r.t.Context(), c, r.mc, ops)
	if err != nil {
		r.t.Fatalf("%s: %v", c.name, err)
	}
	seed := r.rng.Uint64()
	total := 0
	for range h.log.States(rand.New(rand.NewPCG(seed, 0)), 8) {
		total++
	}
	pick := rand.New(rand.NewPCG(seed, 1))
	for s := range h.log.States(rand.New(rand.NewPCG(seed, 0)), 8) {
		if pick.IntN(total) >= limit {
			continue
		}
		r.states++
		if err := r.state(h, s); err != nil {
			r.t.Errorf("%s: power loss after event %d (%s): %v\n%s", c.name, s.At, s.What, err, h.describe(s.At))
			return
		}
	}
}

// describe lists steps and events around a crash point.
func (h *history) describe(at int) string {
	var b strings.Builder
	events := h.log.Events()
	for _, s := range h.steps {
		if s.start > at {
			break
		}
		fmt.Fprintf(&b, "%v\n", s.op)
		for i := s.start; i < s.end; i++ {
			if i == at {
				fmt.Fprintf(&b, "  ---- power loss\n")
			}
			if i > at-20 && i < at+3 {
				fmt.Fprintf(&b, "  %d %v\n", i, events[i])
			}
		}
	}
	return b.String()
}

// state checks one after-crash state.
func (r *crashRun) state(h *history, s storagetest.State) error {
	ctx := context.Background()
	disk := s.Disk()
	flags := make([]byte, 1)
	if _, err := disk.ReadAt(flags, 79); err != nil {
		return err
	}
	dirty := flags[0]&1 != 0
	if dirty {
		r.dirty++
	} else if err := r.corruptions(ctx, h, disk.Clone()); err != nil {
		return fmt.Errorf("as it was found, dirty bit off: %w", err)
	}
	recovery := disk.Record()
	im, err := qcow2.Open(ctx, disk, h.c.options(r.mc))
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	leaks, err := h.check(ctx, im)
	if err != nil {
		return errors.Join(fmt.Errorf("after recovery: %w", err), im.Close())
	}
	if leaks > 0 {
		r.leaky++
	}
	if err := h.judge(ctx, im, disk, r.mc, s.At); err != nil {
		return errors.Join(err, im.Close())
	}
	if err := im.Close(); err != nil {
		return err
	}
	if len(recovery.Events()) > 0 && dirty && r.rng.IntN(10) == 0 {
		if err := r.crashInRecovery(h, recovery, s.At); err != nil {
			return err
		}
	}
	if r.rng.IntN(10) == 0 {
		if err := r.again(ctx, h, disk); err != nil {
			return err
		}
	}
	if r.qemu < *crashQEMU && r.rng.IntN(max(*crashStates / *crashQEMU / 2, 1)) == 0 {
		r.qemu++
		return r.judgeByQEMU(h, disk)
	}
	return nil
}

// corruptions checks disk as it is, without repair.
func (r *crashRun) corruptions(ctx context.Context, h *history, disk *storagetest.Disk) error {
	o := h.c.options(r.mc)
	o.ReadOnly = true
	im, err := qcow2.Open(ctx, disk, o)
	if err != nil {
		return err
	}
	_, err = h.check(ctx, im)
	return errors.Join(err, im.Close())
}

// check returns the number of leaks, or an error if the image is corrupt.
//
// Version 2 has no dirty bit: a crash while a snapshot is taken leaves clusters
// that are counted twice and marked COPIED, which check finds. The other
// count is a leak, so that no data is at risk; QEMU's own snapshots do the same.
func (h *history) check(ctx context.Context, im *qcow2.Image) (leaks int, err error) {
	var found []string
	result, err := im.Check(ctx, qcow2.CheckOptions{Report: func(p qcow2.Problem) {
		if !p.Leak && !(h.c.create.Version == 2 && strings.Contains(p.Msg, "OFLAG_COPIED")) {
			found = append(found, p.Msg)
		}
	}})
	if err == nil && len(found)+result.CheckErrors > 0 {
		err = fmt.Errorf("%+v: %s", result, strings.Join(found[:min(len(found), 5)], "; "))
	}
	return result.Leaks, err
}

// crashInRecovery cuts the power while the image is being repaired.
func (r *crashRun) crashInRecovery(h *history, l *storagetest.Log, at int) error {
	n := 0
	for s := range l.States(r.rng, 2) {
		if n++; n > 20 {
			return nil
		}
		r.nested++
		im, err := qcow2.Open(context.Background(), s.Disk(), h.c.options(r.mc))
		if err != nil {
			return fmt.Errorf("second power loss in recovery (%d, %s): open: %w", s.At, s.What, err)
		}
		_, err = h.check(context.Background(), im)
		if err == nil {
			err = h.judge(context.Background(), im, s.Disk(), r.mc, at)
		}
		if err := errors.Join(err, im.Close()); err != nil {
			return fmt.Errorf("second power loss in recovery (%d, %s): %w", s.At, s.What, err)
		}
	}
	return nil
}

// again opens a recovered image once more, which must change nothing, and then
// uses it.
func (r *crashRun) again(ctx context.Context, h *history, disk *storagetest.Disk) error {
	before := disk.Clone()
	disk.Reopen()
	im, err := qcow2.Open(ctx, disk, h.c.options(r.mc))
	if err != nil {
		return fmt.Errorf("second recovery: %w", err)
	}
	if err := im.Close(); err != nil {
		return fmt.Errorf("second recovery: %w", err)
	}
	if !disk.Equal(before) {
		return errors.New("the second recovery changed the file")
	}
	disk.Reopen()
	if im, err = qcow2.Open(ctx, disk, h.c.options(r.mc)); err != nil {
		return err
	}
	data := fill(im.Size()/2&^511, 99)
	_, err = im.WriteAt(data, 512)
	if err = errors.Join(err, im.Flush(), im.Close()); err != nil {
		return fmt.Errorf("write after recovery: %w", err)
	}
	return r.corruptions(ctx, h, disk.Clone())
}

// judgeByQEMU asks qemu-img about the recovered image.
func (r *crashRun) judgeByQEMU(h *history, disk *storagetest.Disk) error {
	failure := attempt(r.t, func(tb testing.TB) {
		dir := scratch(tb)
		path := filepath.Join(dir, "crashed.qcow2")
		if err := disk.Dump(path); err != nil {
			tb.Fatal(err)
		}
		if h.c.backing {
			base := storagetest.NewDisk()
			if _, err := base.WriteAt(baseContent, 0); err != nil {
				tb.Fatal(err)
			}
			if err := base.Dump(filepath.Join(dir, "base")); err != nil {
				tb.Fatal(err)
			}
		}
		if h.c.create.Version != 2 { // see check
			qemutest.CheckLeaks(tb, path)
		}
	})
	if failure != "" {
		return errors.New(failure)
	}
	return nil
}

// TestPowerLossAtTableGrowth cuts the power while the refcount table and the L1
// table move to larger places.
func TestPowerLossAtTableGrowth(t *testing.T) {
	t.Parallel()
	run := crashRun{t: t, mc: newCache(t, 64<<10), rng: newRand(t)}
	c := crashConfig{name: "growth", size: 4 << 20, create: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64}}

	// Find how much must be written until the refcount table moves.
	d := newDisk(t, c.size, c.create)
	im := openDisk(t, d, c.options(run.mc))
	start := reftableOffset(t, d)
	const step = 32 << 10
	for c.prelude = step; reftableOffset(t, d) == start; c.prelude += step {
		if c.prelude > c.size {
			t.Fatal("the refcount table has never moved")
		}
		if _, err := im.WriteAt(fill(step, 1), c.prelude-step); err != nil {
			t.Fatal(err)
		}
	}
	mustClose(t, im)
	c.prelude -= 2 * step

	at := c.prelude
	run.history(c, []op{
		{"write", at, step / 2, 1}, {"flush", 0, 0, 0}, {"write", at + step/2, step / 2, 2},
		{"write", at + step, step, 3}, {"flush", 0, 0, 0}, {"write", at, 512, 4}, {"write", at + 2*step, step, 5},
	}, 400)
	c.prelude, c.size = 16<<10, 30<<10
	run.history(c, []op{
		{"write", 0, 2048, 1}, {"resize", 0, 40 << 10, 0}, {"write", 60 << 10, 4096, 2}, {"flush", 0, 0, 0}, {"resize", 0, 16 << 10, 0},
	}, 400)
	t.Logf("table growth: %d states, %d with the dirty bit, %d with leaks", run.states, run.dirty, run.leaky)
}

// TestPowerLossAtSnapshots cuts the power at every event while a snapshot that alone has some clusters is
// taken, deleted and gone back to: what random histories hit only sometimes.
func TestPowerLossAtSnapshots(t *testing.T) {
	t.Parallel()
	run := crashRun{t: t, mc: newCache(t, 64<<10), rng: newRand(t)}
	before := []op{{"write", 0, 8192, 9}, {"snap", 0, 0, 0}, {"write", 0, 6144, 5}, {"flush", 0, 0, 0}}
	after := []op{{"write", 2048, 8192, 7}, {"flush", 0, 0, 0}}
	for _, c := range []crashConfig{
		{name: "snapshots", size: 16 << 10, create: qcow2.CreateOptions{ClusterSize: 1024}},
		{name: "snapshots-punch", size: 16 << 10, pass: true, create: qcow2.CreateOptions{ClusterSize: 1024}},
		{name: "snapshots-v2", size: 16 << 10, create: qcow2.CreateOptions{ClusterSize: 1024, Version: 2}},
	} {
		for _, middle := range [][]string{{"delsnap"}, {"apply"}, {"apply", "delsnap"}, {"snap"}, {"snap", "delsnap"}} {
			ops := before[:len(before):len(before)]
			for _, name := range middle {
				ops = append(ops, op{name, 0, 0, 0})
			}
			run.history(c, append(ops, after...), math.MaxInt)
		}
	}
	t.Logf("snapshots: %d states, %d with the dirty bit, %d with leaks", run.states, run.dirty, run.leaky)
}

// reftableOffset returns the refcount table's offset as the header in d says.
func reftableOffset(t *testing.T, d *storagetest.Disk) string {
	t.Helper()
	b := make([]byte, 8)
	if _, err := d.ReadAt(b, 48); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", b)
}

// TestPowerLossSequences cuts the power in all sequences of three operations
// that together touch every ordering rule.
func TestPowerLossSequences(t *testing.T) {
	t.Parallel()
	run := crashRun{t: t, mc: newCache(t, 64<<10), rng: newRand(t)}
	alphabet := []op{
		{"write", 0, 2048, 1}, {"write", 512, 512, 2}, {"discard", 0, 2048, 0}, {"unmap", 1024, 1024, 0},
		{"flush", 0, 0, 0}, {"snap", 0, 0, 0}, {"delsnap", 0, 0, 0}, {"apply", 0, 0, 0},
	}
	initial := []op{{"write", 0, 4096, 9}, {"snap", 0, 0, 0}, {"flush", 0, 0, 0}}
	c := crashConfig{name: "sequence", size: 8 << 10, create: qcow2.CreateOptions{ClusterSize: 1024}}
	limit := max(1, *crashStates/2/(len(alphabet)*len(alphabet)*len(alphabet)))
	for _, first := range alphabet {
		for _, second := range alphabet {
			for _, third := range alphabet {
				run.history(c, append(initial[:len(initial):len(initial)], first, second, third), limit)
				if t.Failed() {
					return
				}
			}
		}
	}
	t.Logf("sequences: %d states, %d with the dirty bit, %d with leaks", run.states, run.dirty, run.leaky)
}
