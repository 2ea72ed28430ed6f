package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Options say how Run plays.
type Options struct {
	Binary string // the csi-qcow2 executable
	Dir    string // stage directory, missing or empty; "" makes a temporary one
	Device string // "auto", "nbd" or "fuse"
	Source string // directory whose files are stored; "" takes embedded ones
	Keep   bool   // leave the agent running and the volumes mounted
	Out    io.Writer
	Color  bool // Out is a terminal
}

// A demo is one run.
type demo struct {
	Options
	stage  stage
	print  *printer
	agent  *agent
	client *client

	checks  int // that held
	files   int // that were compared
	volumes []*volume
}

// Run plays the whole scenario and returns nil only if every check held and
// nothing is left behind; the last line it prints then says so. A cancelled
// context ends it early.
func Run(ctx context.Context, o Options) error {
	if os.Geteuid() != 0 {
		return errors.New("the demo attaches and mounts devices: run it as root")
	}
	stage, err := buildStage(o.Dir)
	if err != nil {
		return err
	}
	d := &demo{Options: o, stage: stage, print: &printer{out: o.Out, color: o.Color}}
	begin := time.Now()
	d.print.line(d.print.paint(bold, "csi-qcow2 demo: the whole life of a volume, on this machine"))
	d.print.line("Everything lies in " + string(stage))

	err = d.play(ctx)
	if d.client != nil {
		d.client.close()
	}
	if err != nil && ctx.Err() == nil && d.agent != nil {
		d.printLog()
	}
	if err == nil && o.Keep {
		d.printKept()
		return nil
	}
	return d.verdict(ctx, err, stage.strike(d.agent), time.Since(begin))
}

// verdict prints the last line of a run that held, and returns the error of
// one that did not, which says where it was and what is left.
func (d *demo) verdict(ctx context.Context, played, struck error, took time.Duration) error {
	after := "nothing is left behind: no mount, no device, no process"
	if struck != nil {
		after = "and this was not put away by itself: " + oneLine(struck)
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted at step %d; %s", d.print.number, after)
	case played != nil:
		return fmt.Errorf("not all held: step %d, %q: %s; %s", d.print.number, d.print.title, oneLine(played), after)
	case struck != nil:
		return fmt.Errorf("not all held: all %d checks did, %s", d.checks, after)
	}
	d.print.last("All %d checks held in %s, %d files compared; %s.", d.checks, duration(took), d.files, after)
	return nil
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// printLog prints the end of the agent's log, for whoever must find out.
func (d *demo) printLog() {
	d.print.line("\nThe end of the node agent's log:")
	for _, line := range d.stage.tail(15) {
		d.print.line("  | " + line)
	}
}

// printKept says how to look around, and how to end it.
func (d *demo) printKept() {
	d.print.last("All %d checks held so far, %d files compared; the node agent runs on and the volumes stay mounted.", d.checks, d.files)
	v := d.volumes[0]
	d.print.line(fmt.Sprintf(`
Look around:
  findmnt -R | grep %[1]s
  ls %[2]s
  qemu-img info -U --backing-chain %[3]s
  %[4]s img snapshot -l -U %[3]s
  tail -f %[5]s

End it, and take everything away:
  %[4]s demo --stop --dir %[1]s`,
		d.stage, d.stage.target(v.id), d.stage.disk(v.id), d.Binary, d.stage.log()))
}

// Stop ends a run that was kept in dir and takes everything of it away.
func Stop(ctx context.Context, dir string, out io.Writer) error {
	s, err := openStage(dir)
	if err != nil {
		return err
	}
	a, err := findAgent(ctx, s)
	if err != nil {
		return err
	}
	if err := s.strike(a); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s is gone: no mount, no device, no process is left.\n", dir)
	return nil
}

// step runs one step of the scenario between its lines of output.
func (d *demo) step(ctx context.Context, title string, run func(context.Context) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	d.print.begins(title)
	err := run(ctx)
	d.print.ends(err == nil)
	return err
}

// hold counts a check that holds, and returns an error for one that does not.
func (d *demo) hold(ok bool, format string, args ...any) error {
	if !ok {
		return fmt.Errorf("it does not hold that "+format, args...)
	}
	d.checks++
	return nil
}

// holds is hold for a check that comes as an error.
func (d *demo) holds(err error) error {
	if err == nil {
		d.checks++
	}
	return err
}
