package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// passLine is what the machine prints last when the program has exited with 0.
const passLine = "GUEST PASS"

// A Job is one boot of a machine.
type Job struct {
	// Program is an executable of this machine that needs no libraries but those in the
	// Environment; Args are its arguments, Env its environment, as NAME=value.
	Program string
	Args    []string
	Env     []string

	// Files are copied into the guest: guest path to path on this machine.
	Files map[string]string

	CPUs      int // default 2
	MemoryMiB int // default 2048

	// Log, when not nil, gets every line as it comes, of the kernel and of the program, from two
	// goroutines.
	Log func(line string)
}

// A Result is what came out of a machine.
type Result struct {
	Kernel []string // lines that the kernel printed
	Output []string // lines that the program printed
	Passed bool     // the program has exited with 0
}

// Run boots the machine, runs the job's program in it and waits for the machine to stop. It returns
// an error when the machine could not run or ctx ended; then the Result holds what was printed
// until then.
func (m *Machine) Run(ctx context.Context, job Job) (Result, error) {
	dir, err := os.MkdirTemp("", "vm-")
	if err != nil {
		return Result{}, err
	}
	defer os.RemoveAll(dir)
	initrd := filepath.Join(dir, "initrd")
	if err := m.writeInitrd(initrd, job); err != nil {
		return Result{}, err
	}
	line, err := net.Listen("unix", filepath.Join(dir, "line"))
	if err != nil {
		return Result{}, err
	}
	defer line.Close()

	cpus, memory := job.CPUs, job.MemoryMiB
	if cpus == 0 {
		cpus = 2
	}
	if memory == 0 {
		memory = 2048
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", fmt.Sprint(cpus), "-m", fmt.Sprint(memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", "stdio,id=kernel", "-serial", "chardev:kernel",
		"-chardev", "socket,id=program,path="+line.Addr().String(), "-serial", "chardev:program",
		"-kernel", m.Kernel.Image, "-initrd", initrd,
		// A panic restarts the machine, and -no-reboot makes that its end.
		"-append", "console=ttyS0 loglevel=7 panic=-1 mitigations=off random.trust_cpu=on")
	kernel := &lineLog{each: job.Log}
	var stderr strings.Builder
	cmd.Stdout, cmd.Stderr = kernel, &stderr
	if err := cmd.Start(); err != nil {
		return Result{}, fmt.Errorf("%w (apt-get install qemu-system-x86)", err)
	}
	program := &lineLog{each: job.Log}
	done := make(chan struct{})
	go func() { // ends with QEMU, or when line is closed without it having connected
		defer close(done)
		conn, err := line.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(program, conn) // what has come is judged, not how it ended
	}()
	waitErr := cmd.Wait()
	line.Close()
	<-done
	r := Result{Kernel: kernel.lines, Output: program.lines}
	if n := len(r.Output); n > 0 && r.Output[n-1] == passLine {
		r.Passed = true
	}
	if ctx.Err() != nil {
		return r, fmt.Errorf("the machine was stopped: %w", context.Cause(ctx))
	}
	if waitErr != nil {
		return r, fmt.Errorf("qemu: %w\n%s", waitErr, stderr.String())
	}
	return r, nil
}

// lineLog keeps the lines that are written to it, and hands each to a function. What follows the
// last newline is dropped.
type lineLog struct {
	lines []string
	each  func(line string) // may be nil
	rest  []byte
}

func (l *lineLog) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.rest = rest
		text := strings.TrimRight(string(line), "\r")
		l.lines = append(l.lines, text)
		if l.each != nil {
			l.each(text)
		}
	}
}

// writeInitrd writes the machine's archive and behind it one with the job.
func (m *Machine) writeInitrd(path string, job Job) (err error) {
	base, err := os.Open(m.initramfs)
	if err != nil {
		return err
	}
	defer base.Close()
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := io.Copy(f, base); err != nil {
		return err
	}
	c := &cpioWriter{w: f}
	c.file("program", job.Program)
	var script strings.Builder
	for _, env := range job.Env {
		fmt.Fprintf(&script, "export %s\n", quote(env))
	}
	script.WriteString("cd /tmp\n/program")
	for _, arg := range job.Args {
		script.WriteString(" " + quote(arg))
	}
	fmt.Fprintf(&script, "\nstatus=$?\necho\nif [ $status = 0 ]; then echo %s; else echo GUEST FAIL: exit status $status; fi\n", passLine)
	c.text("job", 0o644, script.String())
	for name, from := range job.Files {
		c.file(strings.TrimPrefix(name, "/"), from)
	}
	return c.end()
}

// quote makes one shell word of s.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// trouble is what a kernel prints when something is wrong in it, or when a block device has failed
// a request.
var trouble = regexp.MustCompile(`I/O error|Buffer I/O|BUG|WARNING|Oops|Kernel panic|Call Trace|blocked for more than|hung_task:|soft lockup|rcu.*stall|EXT4-fs error|EXT4-fs warning|XFS.*(Corruption|corrupt|error|shutdown|Shutting)|Remounting filesystem read-only`)

// Trouble returns the lines of the kernel that no run may have, but for those that allowed matches;
// nil allows none.
func (r Result) Trouble(allowed *regexp.Regexp) []string {
	var found []string
	for _, line := range r.Kernel {
		if trouble.MatchString(line) && (allowed == nil || !allowed.MatchString(line)) {
			found = append(found, line)
		}
	}
	return found
}
