package main

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"csi-qcow2/nbdexport/nbdtest"
)

// nbdBinaryDir is where nbdBinary has put the command, or "".
var nbdBinaryDir string

func TestMain(m *testing.M) {
	code := m.Run()
	if nbdBinaryDir != "" {
		os.RemoveAll(nbdBinaryDir)
	}
	os.Exit(code)
}

// nbdBinary builds the command once for all tests that run it as a process.
var nbdBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "csi-qcow2-test")
	if err != nil {
		return "", err
	}
	nbdBinaryDir = dir
	path := filepath.Join(dir, "csi-qcow2")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", path, ".")
	cmd.Stderr = os.Stderr
	return path, cmd.Run()
})

// processTime bounds every wait for a process: a machine may be busy.
const processTime = 2 * time.Minute

// A nbdProcess is `csi-qcow2 nbd` as a process, on a unix socket.
type nbdProcess struct {
	t      *testing.T
	socket string
	uri    string
	cmd    *exec.Cmd
	out    bytes.Buffer // stdout and stderr; complete after ended
	ended  chan struct{}
	killed bool // by the test: it has not ended well
}

// kill ends the process as a crash would.
func (p *nbdProcess) kill() {
	p.killed = true
	p.cmd.Process.Kill()
	<-p.ended
}

// startNBD starts `csi-qcow2 nbd -k SOCKET args` and waits until it listens.
// The test's end ends it, and fails when it does not end well.
func startNBD(t *testing.T, args ...string) *nbdProcess {
	t.Helper()
	path, err := nbdBinary()
	if err != nil {
		t.Fatalf("build: %v", err)
	}
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may exceed the length of a socket path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &nbdProcess{t: t, socket: filepath.Join(dir, "s"), ended: make(chan struct{})}
	p.uri = "nbd+unix:///?socket=" + p.socket
	p.cmd = exec.Command(path, append([]string{"nbd", "-k", p.socket}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		p.cmd.Wait()
		close(p.ended)
	}()
	t.Cleanup(func() {
		if !p.killed {
			p.cmd.Process.Signal(syscall.SIGTERM)
			p.waitEnd(0)
		}
	})
	p.until("it listens", func() bool { // the socket is there a moment before
		conn, err := net.Dial("unix", p.socket)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return p
}

// client connects to the process, and has not said anything yet.
func (p *nbdProcess) client() *nbdtest.Client {
	p.t.Helper()
	conn, err := net.Dial("unix", p.socket)
	if err != nil {
		p.t.Fatal(err)
	}
	return nbdtest.NewClient(p.t, conn)
}

// waitEnd waits for the end of the process and checks its exit code.
func (p *nbdProcess) waitEnd(code int) {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(processTime):
		p.cmd.Process.Kill()
		<-p.ended
		p.t.Fatalf("csi-qcow2 nbd does not end\n%s", &p.out)
	}
	if got := p.cmd.ProcessState.ExitCode(); got != code {
		p.t.Fatalf("exit code %d: want %d\n%s", got, code, &p.out)
	}
}

// until waits until ok returns true while the process lives.
func (p *nbdProcess) until(what string, ok func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(processTime); !ok(); {
		select {
		case <-p.ended:
			p.t.Fatalf("csi-qcow2 nbd has ended: waited until %s\n%s", what, &p.out)
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waited %s until %s", processTime, what)
		}
	}
}

// tool runs a program of the Debian package pkg, which must succeed, and
// returns its standard output.
func tool(t *testing.T, pkg, name string, args ...string) string {
	t.Helper()
	out, code := toolCode(t, pkg, name, args...)
	if code != 0 {
		t.Fatalf("%s %q: exit code %d\n%s", name, args, code, out)
	}
	return out
}

// toolCode is tool for a program that may fail; then its messages come with the
// output.
func toolCode(t *testing.T, pkg, name string, args ...string) (string, int) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: install it with \"apt-get install %s\"", name, pkg)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = t.TempDir()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String() + stderr.String() + err.Error(), max(1, cmd.ProcessState.ExitCode())
	}
	return stdout.String(), 0
}
