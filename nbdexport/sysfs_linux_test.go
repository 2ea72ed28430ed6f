package nbdexport

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestOpenNode checks that a node that appears late is found, and one that never does is explained.
func TestOpenNode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := openNode(ctx, path, os.O_RDONLY); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "/dev mounted") {
		t.Errorf("a node that never appears: %v", err)
	}
	made := make(chan error, 1)
	go func() { made <- os.WriteFile(path, nil, 0o600) }()
	f, err := openNode(t.Context(), path, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := <-made; err != nil {
		t.Fatal(err)
	}
}

// ioctlInt is an ioctl with a number, whose result is one.
func ioctlInt(f *os.File, request uint, arg int) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(arg))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// TestOpenedElsewhere looks for a process with a block device open.
func TestOpenedElsewhere(t *testing.T) {
	// A loop device with a number so high that nobody else takes it for the next free one.
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	n, err := ioctlInt(control, unix.LOOP_CTL_ADD, 5000+os.Getpid()%50000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := ioctlInt(control, unix.LOOP_CTL_REMOVE, n); err != nil {
			t.Error(err)
		}
	}()
	path := fmt.Sprintf("/dev/loop%d", n)
	node, err := openNode(t.Context(), path, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	node.Close()
	check := func(want bool) {
		t.Helper()
		if got, err := openedElsewhere(path); got != want || err != nil {
			t.Errorf("opened: %v, %v; want %v", got, err, want)
		}
	}
	check(false)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	check(false) // we do not count
	cmd := exec.Command("sleep", "1000")
	cmd.Stdin = f
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	check(true)
	cmd.Process.Kill()
	cmd.Wait()
	check(false)
}

// TestHasEnded: a socket whose other end is closed is told from one that has nothing to read, and nothing is read.
func TestHasEnded(t *testing.T) {
	client, server, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	check := func(want bool) {
		t.Helper()
		if ended, err := hasEnded(server); ended != want || err != nil {
			t.Errorf("ended: %v, %v; want %v", ended, err, want)
		}
	}
	check(false)
	if _, err := client.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	check(false)
	client.Close()
	check(false) // what was sent is there
	if n, err := server.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	check(true)
}
