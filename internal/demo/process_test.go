package demo

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
)

// TestProcessesAreTheAgents checks that a process that has got the number of an
// agent that ended is not taken for what the agent has left.
func TestProcessesAreTheAgents(t *testing.T) {
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	boot, begun, err := birth(cmd.Process.Pid)
	if err != nil || boot == "" || begun == "" {
		t.Fatalf("birth is %q, %q, %v", boot, begun, err)
	}
	s := stage(t.TempDir())
	if err := os.WriteFile(s.pidFile(), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, birth string
		want        int
	}{
		{"the agent", boot + " " + begun, 1},
		{"a later process", boot + " 1", 0},
		{"a process of another boot", "another " + begun, 0},
		{"nobody knows", "", 0},
	} {
		if err := os.WriteFile(s.birthFile(), []byte(tt.birth), 0o600); err != nil {
			t.Fatal(err)
		}
		if found, err := s.processes(); err != nil || len(found) != tt.want {
			t.Errorf("%s: found %v, %v: want %d", tt.name, found, err, tt.want)
		}
	}
}
