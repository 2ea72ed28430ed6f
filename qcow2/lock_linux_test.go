package qcow2

import (
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mkLockImage makes an empty image of 1 MiB. It is of qcow2 format, because
// QEMU lets raw images be written by several processes at once.
func mkLockImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").CombinedOutput()
	if err != nil {
		t.Fatalf("qemu-img: %v: %s (install qemu-utils)", err, out)
	}
	return path
}

// TestLockModes opens one file twice in each pair of modes.
func TestLockModes(t *testing.T) {
	names := map[LockMode]string{LockNone: "none", LockShared: "shared", LockRead: "read", LockWrite: "write"}
	conflict := map[[2]LockMode]string{ // first holder, second opener: the lock that is refused
		{LockWrite, LockRead}:  `Failed to get shared "write" lock`,
		{LockRead, LockWrite}:  `Failed to get "write" lock`,
		{LockWrite, LockWrite}: `Failed to get "write" lock`,
	}
	for first := LockNone; first <= LockWrite; first++ {
		for second := LockNone; second <= LockWrite; second++ {
			t.Run(names[first]+"-"+names[second], func(t *testing.T) {
				path := mkLockImage(t)
				a, err := OpenFile(path, FileOptions{Lock: first})
				if err != nil {
					t.Fatal(err)
				}
				b, err := OpenFile(path, FileOptions{ReadOnly: second < LockWrite, Lock: second})
				want := conflict[[2]LockMode{first, second}]
				if want == "" {
					if err != nil {
						t.Fatal(err)
					}
					b.Close()
				} else {
					var lockErr *LockError
					if !errors.As(err, &lockErr) || !errors.Is(err, ErrLocked) || lockErr.Lock() != want || lockErr.Path != path {
						t.Fatalf("got %v, want a *LockError: %s", err, want)
					}
				}
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
				again, err := OpenFile(path, FileOptions{Lock: LockWrite})
				if err != nil {
					t.Fatalf("after Close: %v", err)
				}
				again.Close()
			})
		}
	}
}

// TestLockRefusesQEMU holds our lock and starts QEMU's tools.
func TestLockRefusesQEMU(t *testing.T) {
	for _, tt := range []struct {
		name    string
		mode    LockMode
		command []string
		refused string // "" if it must work
	}{
		{"writer keeps reader out", LockWrite, []string{"qemu-img", "info", "-f", "qcow2"}, `Failed to get shared "write" lock`},
		{"writer keeps writer out", LockWrite, []string{"qemu-img", "resize", "-f", "qcow2"}, `Failed to get "write" lock`},
		{"writer lets force-share in", LockWrite, []string{"qemu-img", "info", "-U", "-f", "qcow2"}, ""},
		{"reader lets reader in", LockRead, []string{"qemu-img", "info", "-f", "qcow2"}, ""},
		{"reader keeps writer out", LockRead, []string{"qemu-img", "resize", "-f", "qcow2"}, `Failed to get "write" lock`},
		{"force-share lets writer in", LockShared, []string{"qemu-img", "resize", "-f", "qcow2"}, ""},
		{"force-share lets reader in", LockShared, []string{"qemu-img", "info", "-f", "qcow2"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := mkLockImage(t)
			f, err := OpenFile(path, FileOptions{ReadOnly: tt.mode < LockWrite, Lock: tt.mode})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			args := append(tt.command[1:len(tt.command):len(tt.command)], path)
			if tt.command[1] == "resize" {
				args = append(args, "2M")
			}
			out, err := exec.Command(tt.command[0], args...).CombinedOutput()
			if (err != nil) != (tt.refused != "") || !strings.Contains(string(out), tt.refused) {
				t.Errorf("%v: %v, output %s; want refused with %q", tt.command, err, out, tt.refused)
			}
		})
	}
}

// TestLockRefusedByQEMU lets qemu-io hold the image open and opens it.
func TestLockRefusedByQEMU(t *testing.T) {
	for _, tt := range []struct {
		name    string
		qemu    []string
		mode    LockMode
		refused string
	}{
		{"writer keeps reader out", nil, LockRead, `Failed to get shared "write" lock`},
		{"writer keeps writer out", nil, LockWrite, `Failed to get "write" lock`},
		{"writer lets force-share in", nil, LockShared, ""},
		{"reader keeps writer out", []string{"-r"}, LockWrite, `Failed to get "write" lock`},
		{"reader lets reader in", []string{"-r"}, LockRead, ""},
		{"force-share lets writer in", []string{"-r", "-U"}, LockWrite, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := mkLockImage(t)
			cmd := exec.Command("qemu-io", append(tt.qemu, "-f", "qcow2", path)...)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatalf("%v: install qemu-utils", err)
			}
			defer cmd.Wait()
			defer stdin.Close()
			// A reply to a command means that the image is open.
			if _, err := io.WriteString(stdin, "length\n"); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			for buf := make([]byte, 1); !strings.Contains(out.String(), "1 MiB\n"); {
				if _, err := stdout.Read(buf); err != nil {
					t.Fatalf("qemu-io: %v, output %q", err, out.String())
				}
				out.Write(buf)
			}
			f, err := OpenFile(path, FileOptions{ReadOnly: tt.mode < LockWrite, Lock: tt.mode})
			if tt.refused == "" {
				if err != nil {
					t.Fatal(err)
				}
				f.Close()
				return
			}
			var lockErr *LockError
			if !errors.As(err, &lockErr) || lockErr.Lock() != tt.refused {
				t.Errorf("got %v, want %q", err, tt.refused)
			}
		})
	}
}

// TestLockEndsAtClose closes a file while a process that is being started would have a copy of its descriptor.
func TestLockEndsAtClose(t *testing.T) {
	path := mkLockImage(t)
	open := func() *OSFile {
		f, err := OpenFile(path, FileOptions{Lock: LockWrite})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	first := open()
	dup, err := unix.Dup(int(first.fd.Load()))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dup)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := open().Close(); err != nil {
		t.Fatal(err)
	}
}
