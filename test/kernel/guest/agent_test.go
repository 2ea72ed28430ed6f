//go:build kernelguest

package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

const (
	// binary is where the machine has the program under test.
	binary = "/csi-qcow2"
	// patience bounds every wait of these tests: the machine is emulated, and may share its processors.
	patience = 3 * time.Minute
)

// An agent is a `csi-qcow2 node` that is killed and started again, with a client of its socket.
type agent struct {
	t     *testing.T
	dir   string
	pool  string
	flags []string // beyond the usual

	group int // descriptor of a control group to start in, when not 0

	cmd   *exec.Cmd
	ended chan struct{} // closed when the process has ended
	err   error         // of its Wait; read when ended is closed

	conn *grpc.ClientConn
	csi.IdentityClient
	csi.ControllerClient
	csi.NodeClient
}

// newAgent starts an agent over an empty pool. At the end of the test it is stopped, and nothing may be left.
func newAgent(t *testing.T, flags ...string) *agent {
	t.Helper()
	return startAgent(&agent{t: t, pool: t.TempDir(), flags: flags})
}

// newAgentIn is newAgent in a control group.
func newAgentIn(t *testing.T, group int, flags ...string) *agent {
	t.Helper()
	return startAgent(&agent{t: t, pool: t.TempDir(), flags: flags, group: group})
}

// newAgentOn is newAgent over an empty directory.
func newAgentOn(t *testing.T, pool string) *agent {
	t.Helper()
	return startAgent(&agent{t: t, pool: pool})
}

func startAgent(a *agent) *agent {
	t := a.t
	t.Helper()
	a.dir = t.TempDir()
	before := usedDevices()
	for _, dir := range []string{"staging", "target"} {
		if err := os.Mkdir(a.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := grpc.NewClient("unix://"+a.path("socket"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.2, MaxDelay: 100 * time.Millisecond}, MinConnectTimeout: patience}))
	if err != nil {
		t.Fatal(err)
	}
	a.conn = conn
	a.IdentityClient, a.ControllerClient, a.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	t.Cleanup(func() {
		conn.Close()
		if t.Failed() {
			a.unmountAll()
		}
		if a.running() {
			a.terminate()
		}
		if t.Failed() {
			a.printLog()
		}
		left := slices.DeleteFunc(usedDevices(), func(name string) bool { return slices.Contains(before, name) })
		if len(left) > 0 {
			t.Errorf("devices left: %v", left)
		}
	})
	a.start()
	return a
}

// usedDevices returns what tells in sysfs of the nbd and loop devices that are in use.
func usedDevices() []string {
	nbd, _ := filepath.Glob("/sys/block/nbd*/backend") // fail only on bad patterns
	loop, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	return append(nbd, loop...)
}

func (a *agent) path(name string) string { return filepath.Join(a.dir, name) }
func (a *agent) log() string             { return a.path("log") }

// start starts the process. It does not wait for it to serve: calls do.
func (a *agent) start() {
	a.t.Helper()
	log, err := os.OpenFile(a.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		a.t.Fatal(err)
	}
	defer log.Close()
	a.cmd = exec.Command(binary, append([]string{"node", "--endpoint", "unix://" + a.path("socket"), "--pool", "default=" + a.pool,
		"--run-dir", runDir, "--node-id", "guest", "--device", "nbd", "--cache-bytes", "8388608"}, a.flags...)...)
	a.cmd.Stdout, a.cmd.Stderr = log, log
	if a.group != 0 {
		a.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: a.group}
	}
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) { // ends with the process
		a.err = cmd.Wait()
		close(ended)
	}(a.cmd, a.ended)
}

func (a *agent) running() bool {
	select {
	case <-a.ended:
		return false
	default:
		return true
	}
}

// wait waits until done.
func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s for %s", patience, what)
		}
	}
}

// kill kills the process and waits for its end.
func (a *agent) kill() {
	a.t.Helper()
	if !a.running() {
		a.t.Errorf("the process has ended by itself: %v", a.err)
	}
	a.signal(syscall.SIGKILL)
}

// terminate asks the process to end, and waits for it to do so without an error.
func (a *agent) terminate() {
	a.t.Helper()
	a.signal(syscall.SIGTERM)
	if a.err != nil {
		a.t.Errorf("after SIGTERM: %v", a.err)
	}
}

func (a *agent) signal(sig os.Signal) {
	a.t.Helper()
	a.cmd.Process.Signal(sig)
	select {
	case <-a.ended:
	case <-time.After(patience):
		stack, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stack", a.cmd.Process.Pid, a.cmd.Process.Pid))
		a.t.Fatalf("the process does not end on %v\n%s", sig, stack)
	}
}

// unmountAll takes away what a failed test has left mounted: removing its directory would hang.
func (a *agent) unmountAll() {
	b, err := os.ReadFile("/proc/mounts")
	if err != nil {
		a.t.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], a.dir) {
			if err := unix.Unmount(fields[1], unix.MNT_DETACH); err != nil {
				a.t.Error(err)
			}
		}
	}
}

// restored waits until the process serves the volumes again.
func (a *agent) restored(volumes []*volume) {
	a.t.Helper()
	for _, v := range volumes {
		wait(a.t, v.name+" to be healthy", func() bool { return len(v.health()) == 0 })
	}
}

// printLog prints the end of the log.
func (a *agent) printLog() {
	b, err := os.ReadFile(a.log())
	lines := strings.Split(string(b), "\n")
	a.t.Logf("log of the process (%v):\n%s", err, strings.Join(lines[max(0, len(lines)-150):], "\n"))
}

// call makes a call, and repeats it while the answer is not final, as a CO does: the process is gone, or
// works on something.
func (a *agent) call(name string, do func(context.Context) error) {
	a.t.Helper()
	if err := a.try(name, do); err != nil {
		a.t.Fatal(err)
	}
}

func (a *agent) try(name string, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		err := do(ctx)
		switch status.Code(err) {
		case codes.OK:
			return nil
		case codes.Aborted, codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		default:
			return fmt.Errorf("%s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", name, errors.Join(ctx.Err(), err))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// A worker is something that goes on while the process is killed.
type worker struct {
	name string
	stop context.CancelFunc
	done chan error
}

// workers are those of one test.
type workers struct {
	t   *testing.T
	mu  sync.Mutex
	all []*worker // guarded by mu
}

// start runs fn until stop.
func (w *workers) start(name string, fn func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	one := &worker{name, cancel, make(chan error, 1)}
	go func() { one.done <- fn(ctx) }() // ends soon after cancel
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all = append(w.all, one)
}

// stop ends all workers; none may have failed.
func (w *workers) stop() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, one := range w.all {
		one.stop()
	}
	for _, one := range w.all {
		select {
		case err := <-one.done:
			if err != nil {
				w.t.Errorf("%s: %v", one.name, err)
			}
		case <-time.After(patience):
			w.t.Errorf("%s does not end", one.name)
		}
	}
	w.all = nil
}
