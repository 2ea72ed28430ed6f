package demo_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// scratch is where the binary under test lies.
var scratch string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "csi-qcow2-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	return m.Run()
}

// binary builds csi-qcow2 once and returns its path.
var binary = sync.OnceValue(func() string {
	path := filepath.Join(scratch, "csi-qcow2")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, "csi-qcow2/cmd/csi-qcow2").CombinedOutput(); err != nil {
		panic(fmt.Sprintf("go build: %v\n%s", err, out))
	}
	return path
})

// runTime bounds one run of the demo, and its end.
const runTime = 10 * time.Minute

// A run is the demo as a process.
type run struct {
	t      *testing.T
	dir    string
	cmd    *exec.Cmd
	out    io.ReadCloser
	stderr bytes.Buffer
	done   chan error

	mu     sync.Mutex
	stdout bytes.Buffer  // guarded by mu
	grew   chan struct{} // has a value after stdout grew
}

// start starts the demo on a directory of its own. It stores the demo's own
// source, which is small.
func start(t *testing.T, args ...string) *run {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("the demo needs root")
	}
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	r := &run{t: t, dir: filepath.Join(base, "stage"), done: make(chan error, 1), grew: make(chan struct{}, 1)}
	r.cmd = exec.Command(binary(), append([]string{"demo", "--dir", r.dir, "--source", source}, args...)...)
	r.cmd.Stderr = &r.stderr
	r.out, err = r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends when the demo has ended
		read := bufio.NewReader(r.out)
		for {
			b, err := read.ReadByte()
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
					t.Errorf("the demo's output: %v", err)
				}
				break
			}
			r.mu.Lock()
			r.stdout.WriteByte(b)
			r.mu.Unlock()
			select {
			case r.grew <- struct{}{}:
			default:
			}
		}
		r.done <- r.cmd.Wait()
	}()
	return r
}

func (r *run) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stdout.String()
}

// announced waits until the demo has announced step number.
func (r *run) announced(number int) {
	r.t.Helper()
	title := fmt.Sprintf("\n%3d  ", number)
	for deadline := time.After(runTime); !strings.Contains(r.output(), title); {
		select {
		case <-r.grew:
		case err := <-r.done:
			r.t.Fatalf("the demo ended before step %d: %v\n%s%s", number, err, r.output(), &r.stderr)
		case <-deadline:
			r.t.Fatalf("step %d does not come\n%s", number, r.output())
		}
	}
}

// ended waits for the demo's end and returns its exit code.
func (r *run) ended() int {
	r.t.Helper()
	select {
	case <-r.done:
	case <-time.After(runTime):
		_ = r.cmd.Process.Signal(syscall.SIGQUIT) // prints the goroutines
		<-r.done
		r.t.Fatalf("the demo does not end\n%s%s", r.output(), &r.stderr)
	}
	return r.cmd.ProcessState.ExitCode()
}

// nothingLeft asks the kernel, in other ways than the demo does, whether
// something of the run is left.
func (r *run) nothingLeft() {
	r.t.Helper()
	look := func(pattern string) {
		files, err := filepath.Glob(pattern)
		if err != nil {
			r.t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err == nil && bytes.Contains(text, []byte(r.dir)) {
				r.t.Errorf("left behind: %s has %s", file, r.dir)
			}
		}
	}
	look("/proc/self/mounts")
	look("/sys/block/loop*/loop/backing_file")
	look("/proc/[0-9]*/cmdline")
	backends, err := filepath.Glob("/sys/block/nbd*/backend")
	if err != nil {
		r.t.Fatal(err)
	}
	ids := regexp.MustCompile(`vol-[0-9a-f]{8}-[0-9a-f]{32}`).FindAllString(r.output(), -1)
	for _, file := range backends {
		text, _ := os.ReadFile(file)
		for _, id := range ids {
			if bytes.Contains(text, []byte(id)) {
				r.t.Errorf("left behind: %s has %s", file, id)
			}
		}
	}
	if _, err := os.Stat(r.dir); !errors.Is(err, os.ErrNotExist) {
		r.t.Errorf("left behind: %s (%v)", r.dir, err)
	}
}

// TestDemo plays the whole scenario.
func TestDemo(t *testing.T) {
	r := start(t)
	if code := r.ended(); code != 0 {
		t.Errorf("exit code %d, want 0\n%s%s", code, r.output(), &r.stderr)
	}
	r.nothingLeft()
	lines := strings.Split(strings.TrimSpace(r.output()), "\n")
	if last := lines[len(lines)-1]; !regexp.MustCompile(`^All \d+ checks held in .*nothing is left behind`).MatchString(last) {
		t.Errorf("the last line is %q", last)
	}
	t.Log("\n" + r.output())
}

// TestInterrupt presses Ctrl-C at many points: before the agent is ready, in
// the middle of mkfs, of a snapshot, of a conversion, of the end.
func TestInterrupt(t *testing.T) {
	for _, point := range []struct {
		step  int
		after time.Duration
	}{
		{1, 0}, {2, 0}, {3, 0}, {3, 40 * time.Millisecond}, {4, 10 * time.Millisecond},
		{5, 0}, {5, 20 * time.Millisecond}, {7, 10 * time.Millisecond}, {7, 60 * time.Millisecond},
		{8, 30 * time.Millisecond}, {9, 50 * time.Millisecond}, {11, 30 * time.Millisecond},
		{17, 50 * time.Millisecond}, {18, 10 * time.Millisecond}, {19, 20 * time.Millisecond},
		{22, 10 * time.Millisecond}, {24, 20 * time.Millisecond}, {25, 5 * time.Millisecond},
	} {
		t.Run(fmt.Sprintf("step %d after %v", point.step, point.after), func(t *testing.T) {
			for range 10 {
				r := start(t)
				r.announced(point.step)
				time.Sleep(point.after) // the place in the step is the point of the test, any will do
				if err := r.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
					t.Fatal(err)
				}
				code := r.ended()
				r.nothingLeft()
				if code == 0 {
					continue // on a busy machine the demo may be through before
				}
				if said := r.stderr.String(); code != 1 || !strings.Contains(said, "interrupted at step") || strings.Contains(said, "not put away") {
					t.Errorf("exit code %d, want 1; it said %q\n%s", code, said, r.output())
				}
				return
			}
			t.Error("the demo was always through before it was interrupted")
		})
	}
}

// TestReaderGoes closes the output in the middle, as `| head` does, and hangs
// up, as a terminal that is closed does.
func TestReaderGoes(t *testing.T) {
	t.Run("output", func(t *testing.T) {
		r := start(t)
		r.announced(4)
		if err := r.out.Close(); err != nil {
			t.Fatal(err)
		}
		if code := r.ended(); code != 1 {
			t.Errorf("exit code %d, want 1; it said %q", code, &r.stderr)
		}
		r.nothingLeft()
	})
	t.Run("hangup", func(t *testing.T) {
		r := start(t)
		r.announced(4)
		if err := r.cmd.Process.Signal(unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		if code := r.ended(); code != 1 {
			t.Errorf("exit code %d, want 1; it said %q", code, &r.stderr)
		}
		r.nothingLeft()
	})
}

// TestAgentDies kills the node agent in the middle: the demo fails, says so,
// and still takes everything away.
func TestAgentDies(t *testing.T) {
	r := start(t)
	r.announced(7)
	text, err := os.ReadFile(filepath.Join(r.dir, "node.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := r.ended(); code != 1 || !strings.Contains(r.stderr.String(), "not all held") {
		t.Errorf("exit code %d, want 1; it said %q", code, &r.stderr)
	}
	for _, kind := range []string{"mounts", "loop"} {
		if strings.Contains(r.stderr.String(), "left behind: "+kind) {
			t.Errorf("it said %q", &r.stderr)
		}
	}
	if err := os.RemoveAll(r.dir); err != nil { // kept for a look at the log
		t.Errorf("something is still mounted: %v", err)
	}
	r.nothingLeft()
}

// TestKeepAndStop looks around in a kept demo and ends it.
func TestKeepAndStop(t *testing.T) {
	r := start(t, "--keep")
	if code := r.ended(); code != 0 {
		t.Fatalf("exit code %d, want 0\n%s%s", code, r.output(), &r.stderr)
	}
	stop := func() (string, error) {
		out, err := exec.Command(binary(), "demo", "--stop", "--dir", r.dir).CombinedOutput()
		return string(out), err
	}
	if targets, err := filepath.Glob(filepath.Join(r.dir, "pods", "*", "volume", "tree")); err != nil || len(targets) < 4 {
		t.Errorf("%d volumes are mounted, want 4 or more (%v)", len(targets), err)
	}
	_, advice, _ := strings.Cut(r.output(), "Look around:\n")
	advice, _, _ = strings.Cut(advice, "\n\n")
	commands := strings.Split(advice, "\n")
	if len(commands) < 4 {
		t.Errorf("the advice is %q", advice)
	}
	for _, command := range commands {
		command = strings.Replace(command, "tail -f", "tail -n 1", 1)
		if out, err := exec.Command("sh", "-c", command).CombinedOutput(); err != nil || len(out) == 0 {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	if out, err := stop(); err != nil {
		t.Errorf("demo --stop: %v: %s", err, out)
	}
	r.nothingLeft()
	if _, err := stop(); err == nil {
		t.Error("a second --stop succeeds, want an error that names the directory")
	}
}
