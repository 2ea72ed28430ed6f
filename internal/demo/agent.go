package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

// An agent is the process `csi-qcow2 node` of a stage.
type agent struct {
	pid    int
	exited <-chan struct{} // closed when the process is gone
}

// startAgent starts binary as the node agent of s, in a process group of its
// own: Ctrl-C on the terminal must reach it through us, after the unmounts.
func startAgent(s stage, binary, device string) (*agent, error) {
	log, err := os.Create(s.log())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(binary, "node",
		"--endpoint", "unix://"+s.socket(),
		"--pool", "default="+s.pool(),
		"--run-dir", s.run(),
		"--node-id", "demo",
		"--device", device,
		"--pool-refuse", "0", // a demo is small, whatever part of a large disk is in use
	)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited := make(chan struct{})
	go func() { // ends with the process
		_ = cmd.Wait() // its log says why
		close(exited)
	}()
	a := &agent{cmd.Process.Pid, exited}
	boot, begun, err := birth(a.pid)
	return a, errors.Join(err,
		os.WriteFile(s.birthFile(), []byte(boot+" "+begun), 0o600),
		os.WriteFile(s.pidFile(), []byte(strconv.Itoa(a.pid)), 0o600))
}

// findAgent returns the agent that an earlier run of s left running, or nil.
// The context ends the watch over it.
func findAgent(ctx context.Context, s stage) (*agent, error) {
	text, err := os.ReadFile(s.pidFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return nil, fmt.Errorf("%q: %w", s.pidFile(), err)
	}
	alive := func() bool {
		// The number may have gone to another process since.
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err == nil && strings.Contains(string(line), s.socket())
	}
	if !alive() {
		return nil, nil
	}
	exited := make(chan struct{})
	go func() { // ends with the process or with ctx
		for ctx.Err() == nil && alive() {
			time.Sleep(10 * time.Millisecond)
		}
		close(exited)
	}()
	return &agent{pid, exited}, nil
}

// ready waits until the agent answers Probe, and returns its name and version.
func (a *agent) ready(ctx context.Context, c *client) (name, version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	for {
		response, err := c.identity.Probe(ctx, &csi.ProbeRequest{})
		if err == nil && (response.GetReady() == nil || response.GetReady().GetValue()) {
			break
		}
		select {
		case <-a.exited:
			return "", "", errors.New("the node agent ended")
		case <-ctx.Done():
			return "", "", fmt.Errorf("the node agent does not get ready: %w", errors.Join(ctx.Err(), err))
		case <-time.After(10 * time.Millisecond):
		}
	}
	info, err := c.identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	return info.GetName(), info.GetVendorVersion(), err
}

// stop ends the agent: it asks, waits for at most grace, and then insists.
func (a *agent) stop(grace time.Duration) error {
	_ = unix.Kill(a.pid, unix.SIGTERM) // gone already is as good
	select {
	case <-a.exited:
		return nil
	case <-time.After(grace):
	}
	_ = unix.Kill(-a.pid, unix.SIGKILL)
	select {
	case <-a.exited:
		return fmt.Errorf("the node agent, process %d, did not end within %v and was killed", a.pid, grace)
	case <-time.After(grace):
		return fmt.Errorf("the node agent, process %d, does not end", a.pid)
	}
}

// tail returns the last lines of the agent's log.
func (s stage) tail(lines int) []string {
	f, err := os.Open(s.log())
	if err != nil {
		return nil
	}
	defer f.Close()
	const most = 16 << 10 // bytes
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-most), io.SeekStart)
	}
	text, _ := io.ReadAll(f)
	all := strings.Split(strings.TrimSpace(string(text)), "\n")
	return all[max(0, len(all)-lines):]
}
