package sanity

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// A process is a running `csi-qcow2 node`.
type process struct {
	t      *testing.T
	dir    string // holds all that the process makes
	binary string
	cmd    *exec.Cmd
	log    lockedBuffer
	ended  chan struct{} // closed when the process has ended
	err    error         // of Wait, once ended is closed
	alone  bool          // without a holder: devices end with the process
	args   []string      // more of the command line
}

// lockedBuffer collects output that a test reads while the process writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// deadline bounds every wait of these tests: a machine may be ten times slower
// than it usually is.
const deadline = 5 * time.Minute

// scratch is where the program is built for all tests.
var scratch string

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	var err error
	if scratch, err = os.MkdirTemp("", "csi-sanity-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(scratch)
	return m.Run()
}

// build compiles the program, once, and returns its path.
var build = sync.OnceValues(func() (string, error) {
	binary := filepath.Join(scratch, "csi-qcow2")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "csi-qcow2/cmd/csi-qcow2")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return binary, nil
})

// newProcess returns a process that is not started yet, in a directory of its
// own that leaves no trace. The directory is short: a socket is in it.
func newProcess(t *testing.T) *process {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts filesystems: run it as root")
	}
	for _, tool := range []string{"mkfs.ext4", "mkfs.xfs", "e2fsck", "mount"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v; install e2fsprogs, xfsprogs and mount", err)
		}
	}
	binary, err := build()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "csi-sanity-")
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, dir: dir, binary: binary}
	t.Cleanup(p.cleanUp)
	for _, d := range []string{p.pool(), p.path("run")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Where a kubelet's directory is a link, the mount table shows what it leads to.
	if err := os.Mkdir(p.path("pods-behind-a-link"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(p.path("pods-behind-a-link"), p.path("pods")); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *process) path(name string) string { return filepath.Join(p.dir, name) }
func (p *process) pool() string            { return p.path("pool") }
func (p *process) socket() string          { return p.path("csi.sock") }

// start starts the process and waits until it serves.
func (p *process) start() {
	p.t.Helper()
	p.cmd = exec.Command(p.binary, append([]string{"node", "--endpoint", "unix://" + p.socket(), "--pool", "default=" + p.pool(),
		"--run-dir", p.path("run"), "--node-id", "sanity-node", "--verbosity", "2", fmt.Sprintf("--start-holder=%t", !p.alone),
		"--pool-warn", "0", "--pool-refuse", "0", "--pool-stop", "0", // this machine's disk may be nearly full
	}, p.args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) { // ends with the process
		p.err = cmd.Wait()
		close(ended)
	}(p.cmd, p.ended)
	p.wait("the socket", func() bool {
		select {
		case <-p.ended:
			p.t.Fatalf("the process ended at once: %v\n%s", p.err, p.log.String())
		default:
		}
		conn, err := net.Dial("unix", p.socket())
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

// wait waits until done, or fails the test.
func (p *process) wait(what string, done func() bool) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for !done() {
		select {
		case <-ctx.Done():
			p.t.Fatalf("waited %s for %s\n%s", deadline, what, p.log.String())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// signal sends sig and waits for the end of the process.
func (p *process) signal(sig os.Signal) error {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		return err
	}
	select {
	case <-p.ended:
		return p.err
	case <-time.After(deadline):
		return fmt.Errorf("still running %s after %v", deadline, sig)
	}
}

// mounts lists the mount points below the process's directory, deepest last.
func (p *process) mounts() []string {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(p.dir))
	if err != nil {
		p.t.Error(err)
	}
	var points []string
	for _, info := range infos {
		points = append(points, info.Mountpoint)
	}
	return points
}

// loops lists the loop devices over images of the process's pool. The name of a
// backing file loses its directory with its mount; the volume ID in it stays.
func (p *process) loops() []string {
	var marker struct{ Data struct{ UUID string } }
	b, err := os.ReadFile(filepath.Join(p.pool(), "pool.json"))
	if err == nil {
		err = json.Unmarshal(b, &marker)
	}
	if err != nil || len(marker.Data.UUID) < 8 {
		return nil // it never got as far as a pool
	}
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		p.t.Error(err)
	}
	var devices []string
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.Contains(string(b), "vol-"+marker.Data.UUID[:8]+"-") {
			devices = append(devices, "/dev/"+strings.Split(file, "/")[3])
		}
	}
	return devices
}

// wantNothingLeft waits until nothing is left of the process, no mount, no device and
// no holder: the kernel takes devices away in its own time, a holder ends in its own.
func (p *process) wantNothingLeft() {
	p.t.Helper()
	p.wait("the end of the holder", func() bool { return p.holderPID() == 0 })
	p.wait("the end of the mounts", func() bool { return len(p.mounts()) == 0 })
	p.wait("the end of the loop devices", func() bool { return len(p.loops()) == 0 })
}

// cleanUp removes whatever is left, by force.
func (p *process) cleanUp() {
	if p.ended != nil {
		select {
		case <-p.ended:
		default:
			p.cmd.Process.Signal(syscall.SIGKILL)
			<-p.ended
		}
	}
	if pid := p.holderPID(); pid > 0 {
		p.t.Errorf("had to kill the holder %d", pid)
		p.killHolder()
	}
	mounts := p.mounts()
	for i := len(mounts) - 1; i >= 0; i-- {
		p.t.Errorf("had to unmount %q", mounts[i])
		unix.Unmount(mounts[i], unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	for _, loop := range p.loops() {
		p.t.Errorf("had to detach %q", loop)
		exec.Command("losetup", "-d", loop).Run()
	}
	if p.t.Failed() {
		p.t.Logf("log of the process:\n%s", tail(p.log.String(), 200))
	}
	if err := os.RemoveAll(p.dir); err != nil {
		p.t.Error(err)
	}
}

// tail returns the last n lines of s.
func tail(s string, n int) string {
	lines := strings.SplitAfter(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}
