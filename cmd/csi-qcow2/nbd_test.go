package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"csi-qcow2/internal/qemutest"
	"csi-qcow2/nbdexport/nbdtest"
)

func TestNBDUsageErrors(t *testing.T) {
	image := filepath.Join(t.TempDir(), "i.raw")
	if err := os.WriteFile(image, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want string // in the message
	}{
		{[]string{}, "one image file"},
		{[]string{image, image}, "one image file"},
		{[]string{"--unknown", image}, "--unknown"},
		{[]string{"-Z", image}, "-Z"},
		{[]string{"--cache=fast", image}, "--cache"},
		{[]string{"--discard=maybe", image}, "--discard"},
		{[]string{"-f", "vmdk", image}, "--format"},
		{[]string{"-e", "-1", image}, "--shared"},
		{[]string{"-e", "many", image}, "--shared"},
		{[]string{"-p", "65536", image}, "--port"},
		{[]string{"-p", "http", image}, "--port"},
		{[]string{"-k", strings.Repeat("s", 108), image}, "at most 107"},
		{[]string{"-l", "snapshot.id=1,snapshot.name=x", image}, "--load-snapshot"},
	} {
		var out, stderr bytes.Buffer
		code := run(context.Background(), append([]string{"nbd"}, tt.args...), strings.NewReader(""), &out, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("nbd %q: exit code %d, %q: want %d and a message with %q", tt.args, code, &stderr, exitUsage, tt.want)
		}
	}
}

func TestNBDOpenErrors(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	qcow2 := filepath.Join(dir, "i.qcow2")
	qemutest.Img(t, "create", "-q", "-f", "qcow2", qcow2, "1M")
	raw := filepath.Join(dir, "i.raw")
	qemutest.Img(t, "create", "-q", "-f", "raw", raw, "1M")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-k", filepath.Join(dir, "s"), missing}, fmt.Sprintf("csi-qcow2: nbd: open %q: no such file or directory\n", missing)},
		{[]string{"-k", filepath.Join(dir, "no", "s"), "-f", "qcow2", qcow2}, "no such file"},
		{[]string{"-k", filepath.Join(dir, "s"), "-f", "qcow2", raw}, "not a qcow2"},
		{[]string{"-k", filepath.Join(dir, "s"), "-f", "qcow2", "-l", "none", qcow2}, "no such snapshot"},
		{[]string{"-k", filepath.Join(dir, "s"), "-f", "raw", "-l", "none", raw}, "no internal snapshots"},
	} {
		var out, stderr bytes.Buffer
		code := run(context.Background(), append([]string{"nbd"}, tt.args...), strings.NewReader(""), &out, &stderr)
		if code != exitError || !strings.Contains(stderr.String(), tt.want) {
			t.Errorf("nbd %q: exit code %d, %q: want %d and a message with %q", tt.args, code, &stderr, exitError, tt.want)
		}
	}
}

// TestNBDRunDirOfAServerThatNeverServed checks that a run directory serves another image after one
// that could not be served, and no other image after a server that was killed.
func TestNBDRunDirOfAServerThatNeverServed(t *testing.T) {
	dir := t.TempDir()
	runDir, killed := filepath.Join(dir, "run"), newImage(t, "qcow2")
	refused := func(want string, args ...string) {
		t.Helper()
		var out, stderr bytes.Buffer
		args = append([]string{"nbd", "-f", "qcow2", "--run-dir", runDir}, args...)
		if code := run(t.Context(), args, strings.NewReader(""), &out, &stderr); code != exitError || !strings.Contains(stderr.String(), want) {
			t.Errorf("%q: exit code %d, %q; want %d and a message with %q", args, code, &stderr, exitError, want)
		}
	}
	missing := filepath.Join(dir, "missing")
	refused("open \""+missing, "-k", filepath.Join(dir, "s"), missing)
	refused("no/s", "-k", filepath.Join(dir, "no", "s"), newImage(t, "qcow2"))
	startNBD(t, "-t", "-f", "qcow2", "--run-dir", runDir, killed).kill()
	away := killed + ".away"
	if err := os.Rename(killed, away); err != nil {
		t.Fatal(err)
	}
	refused("open \""+killed, "-k", filepath.Join(dir, "s"), killed)
	refused("was killed", "-k", filepath.Join(dir, "s"), away)
}

// newImage makes an image of 64 MiB with some content.
func newImage(t *testing.T, format string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk."+format)
	qemutest.Img(t, "create", "-q", "-f", format, path, "64M")
	qemutest.IOFormat(t, format, path, "write -P 0x11 1M 3M", "write -P 0x22 9M 64k", "write -z 20M 1M")
	return path
}

// TestNBDEndsWithItsLastClient checks that a server without -t ends after its
// clients, and not after one that has never negotiated.
func TestNBDEndsWithItsLastClient(t *testing.T) {
	p := startNBD(t, "-f", "raw", newImage(t, "raw"))
	idle, err := net.Dial("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	idle.Close()
	tool(t, "libnbd-bin", "nbdinfo", "--size", p.uri)
	p.waitEnd(0)
	if _, err := os.Lstat(p.socket); err == nil {
		t.Error("the socket is still there")
	}
}

func TestNBDPersistent(t *testing.T) {
	p := startNBD(t, "-t", "-f", "raw", newImage(t, "raw"))
	for range 3 {
		tool(t, "libnbd-bin", "nbdinfo", "--size", p.uri)
	}
}

// TestNBDTermination checks that SIGTERM ends the server with exit code 0 while
// a client is connected, that what was written is in the file, and that socket
// and PID file are removed.
func TestNBDTermination(t *testing.T) {
	image := newImage(t, "qcow2")
	pidFile := filepath.Join(t.TempDir(), "pid")
	p := startNBD(t, "-t", "-f", "qcow2", "--pid-file", pidFile, image)
	p.until("PID file is there", func() bool {
		b, _ := os.ReadFile(pidFile)
		return string(b) == fmt.Sprintln(p.cmd.Process.Pid)
	})
	client := p.client()
	client.Start("", nbdtest.Simple)
	payload := bytes.Repeat([]byte("x"), 4096)
	if r := client.Do(nbdtest.Request{Type: nbdtest.CmdWrite, Off: 30 << 20, Len: 4096, Payload: payload}); r.Err != 0 {
		t.Fatal(r.Err)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.waitEnd(0)
	client.ExpectClosed()
	for _, path := range []string{p.socket, pidFile} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there", path)
		}
	}
	qemutest.IO(t, image, "read -P 0x78 30M 4k")
	tool(t, qemutest.Package, "qemu-img", "check", image)
}

func TestNBDReplacesADeadSocket(t *testing.T) {
	p := startNBD(t, "-t", "-f", "raw", newImage(t, "raw"))
	p.kill()
	cmd := exec.Command(p.cmd.Path, p.cmd.Args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var out string
	for code := 1; code != 0; { // until the new process listens; the package's timeout bounds it
		out, code = toolCode(t, "libnbd-bin", "nbdinfo", "--size", p.uri)
	}
	if strings.TrimSpace(out) != strconv.Itoa(64<<20) {
		t.Errorf("size %q", out)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestNBDKeepsAFileInTheWayOfItsSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "precious")
	if err := os.WriteFile(path, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, stderr bytes.Buffer
	code := run(context.Background(), []string{"nbd", "-k", path, "-f", "raw", newImage(t, "raw")}, strings.NewReader(""), &out, &stderr)
	if b, err := os.ReadFile(path); code != exitError || err != nil || string(b) != "data" {
		t.Errorf("exit code %d, file %q, %v", code, b, err)
	}
}

func TestNBDNamesAndDescribesItsExport(t *testing.T) {
	p := startNBD(t, "-t", "-f", "raw", "-x", "disk", "-D", "a fine disk", newImage(t, "raw"))
	list := tool(t, "libnbd-bin", "nbdinfo", "--list", p.uri)
	for _, want := range []string{`export="disk"`, "a fine disk"} {
		if !strings.Contains(list, want) {
			t.Errorf("no %s in %s", want, list)
		}
	}
	if out, code := toolCode(t, "libnbd-bin", "nbdinfo", "--size", p.uri); code == 0 {
		t.Errorf("the unnamed export exists: %s", out)
	}
	tool(t, "libnbd-bin", "nbdinfo", "--size", "nbd+unix:///disk?socket="+p.socket)
}

func TestNBDReadOnly(t *testing.T) {
	p := startNBD(t, "-t", "-f", "qcow2", "-r", newImage(t, "qcow2"))
	client := p.client()
	client.Start("", nbdtest.Structured)
	r := client.Do(nbdtest.Request{Type: nbdtest.CmdWrite, Len: 512, Payload: make([]byte, 512)})
	if r.Err != syscall.EPERM {
		t.Errorf("write: %v: want EPERM", r.Err)
	}
}

func TestNBDSnapshot(t *testing.T) {
	image := newImage(t, "qcow2")
	qemutest.Img(t, "snapshot", "-c", "before", image)
	qemutest.IO(t, image, "write -P 0x33 1M 3M")
	for _, arg := range []string{"before", "1", "snapshot.id=1", "snapshot.name=before"} {
		p := startNBD(t, "-t", "-f", "qcow2", "-l", arg, image)
		tool(t, qemutest.Package, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0x11 1M 3M", p.uri)
		tool(t, "libnbd-bin", "nbdinfo", "--is", "read-only", p.uri)
	}
}

// TestNBDShared checks that -e bounds the clients at once, and that the next
// one is served when one has gone.
func TestNBDShared(t *testing.T) {
	p := startNBD(t, "-t", "-e", "2", "-f", "raw", newImage(t, "raw"))
	a, b, c := p.client(), p.client(), p.client()
	a.Start("", nbdtest.Simple)
	b.Start("", nbdtest.Simple)
	c.Conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("third client: %d bytes, %v: want it to wait", n, err)
	}
	a.Conn.Close()
	c.Start("", nbdtest.Simple)
}

// TestNBDSocketActivation is how libnbd starts a server of its own.
func TestNBDSocketActivation(t *testing.T) {
	path, err := nbdBinary()
	if err != nil {
		t.Fatal(err)
	}
	out := tool(t, "libnbd-bin", "nbdinfo", "--size", "--", "[", path, "nbd", "-f", "raw", newImage(t, "raw"), "]")
	if strings.TrimSpace(out) != strconv.Itoa(64<<20) {
		t.Errorf("size %q", out)
	}
}

func TestNBDOverTCP(t *testing.T) {
	path, err := nbdBinary()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	cmd := exec.Command(path, "nbd", "-b", "127.0.0.1", "-p", port, "-f", "raw", newImage(t, "raw"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for code := 1; code != 0; { // until it listens; the package's timeout bounds it
		_, code = toolCode(t, "libnbd-bin", "nbdinfo", "--size", "nbd://127.0.0.1:"+port)
	}
	if err := cmd.Wait(); err != nil { // without -t, after its client
		t.Error(err)
	}
}

func TestNBDCacheModesAndDiscard(t *testing.T) {
	for _, args := range [][]string{
		{"--cache=writeback"}, {"--cache=writethrough"}, {"--cache=none"}, {"--cache=directsync"},
		{"--cache=unsafe"}, {"-n"}, {"--discard=unmap"}, {"--discard=ignore"},
	} {
		for _, format := range []string{"raw", "qcow2"} {
			t.Run(format+" "+args[0], func(t *testing.T) {
				image := newImage(t, format)
				p := startNBD(t, append([]string{"-t", "-f", format, image}, args...)...)
				qemutest.IOFormat(t, "raw", p.uri, "write -P 0x44 5000 100000", "write -P 0x55 2M 4k", "flush",
					"read -P 0x44 5000 100000", "read -P 0x55 2M 4k", "discard 32M 1M", "write -z -u 40M 1M")
				p.cmd.Process.Signal(syscall.SIGTERM)
				p.waitEnd(0)
				qemutest.IOFormat(t, format, image, "read -P 0x44 5000 100000", "read -P 0x55 2M 4k")
			})
		}
	}
}
