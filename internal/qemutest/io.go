package qemutest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// IO runs qemu-io commands on the qcow2 image at path, in one process, and
// returns the output. A command that reports an error fails the test.
//
// Commands are those of qemu-io: "write -P 0x5a 0 64k", "write -z -u 0 4k",
// "discard 0 64k", "read -P 0 0 512", "flush", "truncate 2M".
func IO(tb testing.TB, path string, commands ...string) string {
	tb.Helper()
	return IOFormat(tb, "qcow2", path, commands...)
}

// IOFormat is IO on an image of another format.
func IOFormat(tb testing.TB, format, path string, commands ...string) string {
	tb.Helper()
	_, all, status := run(tb, strings.Join(commands, "\n")+"\nquit\n", "qemu-io", "-d", "unmap", "-f", format, path)
	if status != 0 || failed(all) {
		tb.Fatalf("qemu-io %s: exit status %d\n%s\ncommands:\n%s", path, status, head(all), head(strings.Join(commands, "\n")))
	}
	return all
}

// failed reports whether the output of qemu-io holds an error: its exit status
// does not tell of failed commands that come by standard input.
func failed(out string) bool {
	for _, line := range strings.Split(out, "\n") {
		line = strings.TrimPrefix(line, "qemu-io> ")
		if strings.Contains(line, "failed") || strings.Contains(line, "error") ||
			strings.HasPrefix(line, "qemu-io: ") || strings.Contains(line, "invalid") ||
			strings.Contains(line, "not found") || strings.Contains(line, "usage") {
			return true
		}
	}
	return false
}

// Serve exports the image with qemu-nbd until the test ends, and returns the
// path of its unix socket. args are further options, as "-r" or "-l name".
func Serve(tb testing.TB, format, image string, args ...string) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "nbd") // t.TempDir may exceed the length of a socket path
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(path(tb, "qemu-nbd"), append(append([]string{"-t", "-k", socket, "-f", format}, args...), image)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // ends with the process
		cmd.Wait()
		close(done)
	}()
	tb.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		<-done
	})
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(socket); err == nil {
			return socket
		}
		select {
		case <-done:
			tb.Fatalf("qemu-nbd %s ended:\n%s", image, out.String())
		case <-deadline:
			tb.Fatalf("qemu-nbd %s does not serve", image)
		case <-tick.C:
		}
	}
}
