package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/qcow2"
)

// options are the command line.
type options struct {
	dir     string
	size    int64
	runs    int
	turn    time.Duration
	lead    time.Duration
	depth   int
	places  int
	pause   time.Duration
	qemu    bool
	profile string // file in a temporary directory
}

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", "/dev/shm", "where the image is made: a tmpfs with room for 4 GiB")
	flag.Int64Var(&o.size, "size", 2<<40, "virtual size of the image, bytes")
	flag.IntVar(&o.runs, "runs", 5, "runs")
	flag.DurationVar(&o.turn, "turn", 4*time.Second, "how long one turn lasts at least")
	flag.DurationVar(&o.lead, "lead", 500*time.Millisecond, "how much of it passes before the snapshot begins")
	flag.IntVar(&o.depth, "depth", 8, "writes under way at a time")
	flag.IntVar(&o.places, "places", 16384, "places that are written to")
	flag.DurationVar(&o.pause, "pause", 500*time.Microsecond, "how long each client waits between two writes")
	flag.BoolVar(&o.qemu, "qemu", true, "compare with qemu-img snapshot")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "stall:", err)
		os.Exit(1)
	}
}

// The kinds of turns of a run, in their order.
const (
	turnWithout = iota
	turnCreate
	turnWith
	turnDelete
	turnCount
)

var turnNames = [...]string{"without", "create", "with", "delete"}

// A result is what the runs gave.
type result struct {
	longest [turnCount][]time.Duration // of each run
	took    [turnCount][]time.Duration // the operation, of each run
	writes  [turnCount]histogram
	heap    uint64 // the most that was in use during an operation, bytes
	before  uint64 // in use before the first
	qemu    [turnCount]time.Duration
}

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "csi-qcow2-stall")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	path := filepath.Join(dir, "disk.qcow2")
	o.profile = filepath.Join(dir, "profile")
	if err := create(ctx, path, o.size); err != nil {
		return err
	}
	a, err := attach(ctx, path, o.depth)
	if err != nil {
		return err
	}
	r := &result{}
	err = errors.Join(measure(ctx, o, a, r), a.close())
	if err == nil && o.qemu {
		err = measureQEMU(ctx, path, r)
	}
	if err != nil {
		return err
	}
	return errors.Join(printProfile(ctx, o), report(o, r))
}

// printProfile says what the processors did for the operations: the samples of
// the sweep, and of the passes that it starts.
func printProfile(ctx context.Context, o options) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, kind := range []int{turnCreate, turnDelete} {
		out, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-top", "-nodecount", "16",
			"-tagfocus", "operation="+turnNames[kind], self, o.profile).CombinedOutput()
		if err != nil {
			return fmt.Errorf("go tool pprof: %w: %s", err, out)
		}
		_, table, _ := strings.Cut(string(out), "Showing nodes")
		fmt.Printf("\nprocessor time of %s, all runs:%s", turnNames[kind], table)
	}
	return nil
}

// measure does the runs on an attached image.
func measure(ctx context.Context, o options, a *attached, r *result) error {
	f, err := os.Create(o.profile)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	l := &load{clients: a.clients, places: newPlaces(o.size, o.places), pause: o.pause}
	if _, err := l.run(ctx, o.turn, 0, nil); err != nil { // the pages of the places
		return err
	}
	runtime.GC()
	r.before = heapInUse()
	var taken qcow2.Snapshot
	for n := range o.runs {
		operations := [turnCount]func() error{
			turnCreate: func() (err error) {
				taken, err = a.image.CreateSnapshot(ctx, qcow2.Snapshot{Name: fmt.Sprint("run", n)})
				return err
			},
			turnDelete: func() error { return a.image.DeleteSnapshot(ctx, taken.ID) },
		}
		for kind, operation := range operations {
			during := operation
			if operation != nil {
				during = func() error { return r.time(kind, operation) }
			}
			h, err := l.run(ctx, o.turn, o.lead, during)
			if err != nil {
				return err
			}
			r.longest[kind] = append(r.longest[kind], h.max())
			r.writes[kind].merge(h)
		}
		fmt.Printf("run %d: longest write", n+1)
		for kind := range turnCount {
			fmt.Printf(", %s %v", turnNames[kind], r.longest[kind][n].Round(10*time.Microsecond))
		}
		fmt.Printf("; create took %v, delete %v\n", r.took[turnCreate][n].Round(time.Millisecond), r.took[turnDelete][n].Round(time.Millisecond))
	}
	return nil
}

// time runs an operation, and looks at the heap meanwhile.
func (r *result) time(kind int, operation func() error) (err error) {
	done := make(chan struct{})
	watched := make(chan struct{})
	go func() { // ends with the operation
		defer close(watched)
		for {
			r.heap = max(r.heap, heapInUse())
			select {
			case <-done:
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	}()
	begin := time.Now()
	pprof.Do(context.Background(), pprof.Labels("operation", turnNames[kind]), func(context.Context) { err = operation() })
	r.took[kind] = append(r.took[kind], time.Since(begin))
	close(done)
	<-watched
	return err
}

// measureQEMU takes and deletes a snapshot of the closed image with qemu-img.
func measureQEMU(ctx context.Context, path string, r *result) error {
	for _, step := range []struct {
		kind int
		flag string
	}{{turnCreate, "-c"}, {turnDelete, "-d"}} {
		begin := time.Now()
		out, err := exec.CommandContext(ctx, "qemu-img", "snapshot", step.flag, "peer", path).CombinedOutput()
		if err != nil {
			return fmt.Errorf("qemu-img snapshot %s: %w: %s", step.flag, err, out)
		}
		r.qemu[step.kind] = time.Since(begin)
	}
	return nil
}

func median(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}
