package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"csi-qcow2/nbdexport/holder"
)

// holderFlags are the flags of `csi-qcow2 holder`.
type holderFlags struct {
	runDir string
	detach bool
	ready  int // descriptor to report to, in the process that --detach starts; 0 for none
}

func newHolderCommand() *cobra.Command {
	f := holderFlags{runDir: defaultNodeFlags().runDir}
	cmd := &cobra.Command{
		Use:   "holder",
		Short: "Keep what a killed node agent's successor needs to go on serving FUSE devices",
		Long: `Keep copies of the descriptors of FUSE devices for "csi-qcow2 node", so that the
devices outlive a node agent that is killed: requests wait for the next one instead
of failing. It reads no data and knows no image.

The node agent starts one with --detach when none answers. Where processes end with
their container, run it in a container of its own.

SIGTERM ends it as soon as it holds nothing.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !filepath.IsAbs(f.runDir) {
				return usageErrorf("--run-dir %q: want an absolute path", f.runDir)
			}
			if f.detach {
				return detachHolder(cmd.Context(), f.runDir)
			}
			return runHolder(cmd.Context(), f)
		},
	}
	cmd.Flags().StringVar(&f.runDir, "run-dir", f.runDir, "run directory of the node agent")
	cmd.Flags().BoolVar(&f.detach, "detach", false, "start it in the background, return when it answers; it ends when it is not needed any more")
	cmd.Flags().IntVar(&f.ready, "ready-fd", 0, "")
	_ = cmd.Flags().MarkHidden("ready-fd") // it exists
	return cmd
}

// holderReady is what a detached holder reports when it answers. Anything else is why it does not.
const holderReady = "ready"

// runHolder holds until it is told to end, or, detached, until it is not needed.
func runHolder(ctx context.Context, f holderFlags) error {
	// When memory is short, everything else is ended first: who holds loses nothing by waiting.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		klog.V(2).InfoS("the holder is not protected from a lack of memory", "error", err.Error())
	}
	s, err := listenHolder(ctx, f)
	if f.ready > 0 {
		report := os.NewFile(uintptr(f.ready), "ready")
		text := holderReady
		if err != nil {
			text = err.Error()
		}
		_, reportErr := report.WriteString(text)
		err = errors.Join(err, reportErr, report.Close())
	}
	if err != nil {
		return err
	}
	klog.InfoS("holding", "runDir", f.runDir, "version", version)
	defer context.AfterFunc(ctx, func() { klog.InfoS("ending when nothing is held any more", "held", s.Held()) })()
	return s.Serve(ctx, f.ready > 0)
}

// idleHolderWait bounds the wait for a holder that was not needed and is about to end.
const idleHolderWait = 2 * time.Second

func listenHolder(ctx context.Context, f holderFlags) (s *holder.Server, err error) {
	if err := os.MkdirAll(f.runDir, 0o700); err != nil {
		return nil, err
	}
	wait := time.Duration(0)
	if f.ready > 0 { // nobody has answered a moment ago
		wait = idleHolderWait
	}
	err = waitFor(ctx, wait, holder.ErrRunning, func() error {
		s, err = holder.Listen(f.runDir)
		return err
	})
	return s, err
}

// holderLog is the file in a run directory that a detached holder writes its log to.
const holderLog = "holder.log"

// detachHolder starts a holder that outlives this process, and its session and its terminal.
func detachHolder(ctx context.Context, runDir string) error {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(runDir, holderLog), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := &exec.Cmd{
		Path:        "/proc/self/exe", // the program that runs, even when another has its name by now
		Args:        []string{"csi-qcow2", "holder", "--run-dir", runDir, "--ready-fd", "3"},
		Env:         []string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1"},
		Dir:         "/",
		Stdout:      log,
		Stderr:      log,
		ExtraFiles:  []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { r.Close() })()
	answer, err := io.ReadAll(io.LimitReader(r, 4096))
	if string(answer) == holderReady {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("start a holder for %q: %s; see %q", runDir, bytes.TrimSpace(answer), log.Name())
	}
	_ = cmd.Wait() // it has said why it ends
	return err
}

// startHolderTimeout bounds the start of a process.
const startHolderTimeout = 10 * time.Second

// holderClient returns the client of the holder of runDir. It starts one when none answers and start is
// set.
func holderClient(runDir string, start bool) *holder.Client {
	if !start {
		return holder.NewClient(runDir, nil)
	}
	return holder.NewClient(runDir, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), startHolderTimeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe", "holder", "--run-dir", runDir, "--detach")
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // what a terminal sends is not for it
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("csi-qcow2 holder --detach: %w: %s", err, bytes.TrimSpace(out))
		}
		klog.InfoS("started a holder", "runDir", runDir)
		return nil
	})
}
