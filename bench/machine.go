package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// A machine is where figures come from, and what of.
type machine struct {
	CPU      string
	Cores    int
	Memory   string
	Load     float64 // average of the minute before the run: others that work
	Kernel   string
	Versions []string // of the peers
	Revision string   // of ours
}

// thisMachine describes the machine, the peers and us.
func thisMachine(ctx context.Context) (machine, error) {
	m := machine{Cores: runtime.NumCPU(), CPU: "unknown"}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, model, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(model)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, err
	}
	m.Memory = fmt.Sprintf("%.0f GiB", float64(info.Totalram)*float64(info.Unit)/(1<<30))
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return m, err
	}
	m.Load = float64(info.Loads[0]) / (1 << 16)
	m.Kernel = unix.ByteSliceToString(uts.Release[:])
	for _, args := range [][]string{{"qemu-nbd", "--version"}, {"nbdkit", "--version"}, {"nbdcopy", "--version"}, {"fio", "--version"}} {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).Output()
		if err != nil {
			return m, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
		first, _, _ := strings.Cut(string(out), "\n")
		m.Versions = append(m.Versions, first)
	}
	m.Versions = append(m.Versions, runtime.Version())
	var err error
	m.Revision, err = revision(ctx)
	return m, err
}

// revision names the commit that is measured, and says so when the tree differs
// from it. What bench writes itself does not count.
func revision(ctx context.Context) (string, error) {
	head, err := exec.CommandContext(ctx, "git", "-c", "safe.directory=*", "rev-parse", "--short", "HEAD").Output()
	if err != nil {
		return "", fmt.Errorf("git rev-parse: %w", err)
	}
	changed, err := exec.CommandContext(ctx, "git", "-c", "safe.directory=*", "status", "--porcelain", "--", ":/", ":(exclude,top)bench").Output()
	if err != nil {
		return "", fmt.Errorf("git status: %w", err)
	}
	name := strings.TrimSpace(string(head))
	if len(changed) > 0 {
		name += "-changed"
	}
	return name, nil
}

// same reports whether m and o may stand in one table.
func (m machine) same(o machine) bool {
	return m.CPU == o.CPU && m.Cores == o.Cores && m.Kernel == o.Kernel && m.Revision == o.Revision
}

// text returns m for people.
func (m machine) text() string {
	return fmt.Sprintf("%s, %d cores, %s of memory, Linux %s, load average %.1f before the run; %s",
		m.CPU, m.Cores, m.Memory, m.Kernel, m.Load, strings.Join(m.Versions, ", "))
}
