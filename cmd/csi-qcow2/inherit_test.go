package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDescriptorsAreNotInherited: what the process has open with an arena, an
// image and clients closes in the programs that it starts; otherwise a child
// would keep locks that its successor needs (rule A9).
func TestDescriptorsAreNotInherited(t *testing.T) {
	p := startNBD(t, "--run-dir", t.TempDir(), newImage(t, "qcow2"))
	p.client()
	dir := fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid)
	ds, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, d := range ds {
		if n, _ := strconv.Atoi(d.Name()); n <= 2 {
			continue
		}
		target, err := os.Readlink(filepath.Join(dir, d.Name()))
		info, err2 := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", p.cmd.Process.Pid, d.Name()))
		if err != nil || err2 != nil {
			continue // closed since
		}
		if ours, err := os.Readlink("/proc/self/fd/" + d.Name()); err == nil && ours == target {
			continue // from who started the test
		}
		seen = append(seen, target)
		_, rest, _ := strings.Cut(string(info), "flags:")
		flags, err := strconv.ParseUint(strings.Fields(rest)[0], 8, 64)
		if err != nil || flags&unix.O_CLOEXEC == 0 {
			t.Errorf("descriptor %s, %s, would be inherited: flags %#o, %v", d.Name(), target, flags, err)
		}
	}
	for _, want := range []string{"arena", ".qcow2", "socket:"} {
		if !strings.Contains(strings.Join(seen, "\n"), want) {
			t.Errorf("nothing like %q is open: %q", want, seen)
		}
	}
}
