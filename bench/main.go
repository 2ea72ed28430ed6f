package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// options are the command line.
type options struct {
	run    string
	pairs  int
	time   time.Duration
	dir    string
	disk   string
	out    string
	list   bool
	record bool
	resume bool
	report bool
	role   string // of a process that a line starts, see roles
}

func main() {
	var o options
	flag.StringVar(&o.run, "run", "", "run the lines whose name or group matches this `REGEXP`")
	flag.IntVar(&o.pairs, "pairs", 5, "rounds of each line")
	flag.DurationVar(&o.time, "time", time.Second, "how long one load runs")
	flag.StringVar(&o.dir, "dir", "/dev/shm", "where images are made: a tmpfs with room for 8 GiB")
	flag.StringVar(&o.disk, "disk", "/var/tmp", "the same for the lines that want a disk")
	flag.StringVar(&o.out, "out", "bench", "where results are kept")
	flag.BoolVar(&o.list, "list", false, "list the lines")
	flag.BoolVar(&o.record, "record", false, "keep the results and write RESULTS.md")
	flag.BoolVar(&o.resume, "resume", false, "leave out lines that this revision has results of")
	flag.BoolVar(&o.report, "report", false, "only write RESULTS.md again")
	flag.StringVar(&o.role, "role", "", "used by the program itself")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := bench(ctx, o, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench does what o says.
func bench(ctx context.Context, o options, args []string) error {
	if o.role != "" {
		return playRole(ctx, o.role, args)
	}
	re, err := regexp.Compile(o.run)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	if o.pairs < 1 {
		return fmt.Errorf("-pairs %d: want 1 or more", o.pairs)
	}
	var chosen []*line
	for _, l := range lines(sizesOfRecord) {
		if re.MatchString(l.name) || re.MatchString(l.group) {
			chosen = append(chosen, l)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("-run %q: no line or group has such a name; -list names them", o.run)
	}
	if o.list {
		for _, l := range chosen {
			fmt.Printf("%-10s %-26s %s\n", l.group, l.name, l.title)
		}
		return nil
	}
	kept, err := loadResults(o.out)
	if err != nil {
		return err
	}
	if o.report {
		return kept.write(o.out)
	}
	e, err := newEnv(ctx, o, sizesOfRecord)
	if err != nil {
		return err
	}
	defer e.close()
	var failed error
	for _, l := range chosen {
		if o.resume && kept.has(l.name, e.machine) {
			continue
		}
		r, err := e.runLine(ctx, l)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", l.name, err))
			fmt.Fprintf(os.Stderr, "%s: %v\n", l.name, err)
			if ctx.Err() != nil {
				break
			}
			continue
		}
		fmt.Println(r.text())
		if !o.record {
			continue
		}
		kept.put(r)
		if err := kept.write(o.out); err != nil {
			return errors.Join(failed, err)
		}
	}
	return failed
}
