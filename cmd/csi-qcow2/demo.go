package main

import (
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"csi-qcow2/internal/demo"
)

func newDemoCommand() *cobra.Command {
	o := demo.Options{}
	stop := false
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Play the whole life of a volume on this machine",
		Long: `Demo starts a node agent on an empty pool and plays a Kubernetes node against
it, over its CSI socket, with real devices and filesystems: create, mount,
snapshot, restore, clone, expand, trim, delete. What it stores, it compares.

It needs root. It exits with 0 only if everything held, and in every case takes
away what it made.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			devices := []string{"auto", "nbd", "fuse"}
			if !slices.Contains(devices, o.Device) {
				return usageErrorf("--device is %q; want one of %s", o.Device, strings.Join(devices, ", "))
			}
			o.Out = cmd.OutOrStdout()
			if stop {
				if o.Dir == "" {
					return usageErrorf("--stop needs --dir, the directory that the kept demo named")
				}
				return demo.Stop(cmd.Context(), o.Dir, o.Out)
			}
			var err error
			if o.Binary, err = os.Executable(); err != nil {
				return err
			}
			o.Color = isTerminal(o.Out)
			if o.Source == "" {
				o.Source = goSource()
			}
			// Also a terminal that is closed, or a reader of the output that goes,
			// must not leave mounts behind.
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGHUP)
			defer stop()
			signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) // which would end the process at once
			o.Out = &watchedOutput{o.Out, stop}
			return demo.Run(ctx, o)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&o.Keep, "keep", false, "leave the node agent running and the volumes mounted, and say how to look around")
	flags.BoolVar(&stop, "stop", false, "end what --keep left running in --dir")
	flags.StringVar(&o.Dir, "dir", "", "new `directory` for everything (default a temporary one)")
	flags.StringVar(&o.Device, "device", "auto", "how volumes become block devices: nbd, fuse or auto")
	flags.StringVar(&o.Source, "source", "", "`directory` whose files are stored (default Go's standard library, or else the demo's own source)")
	return cmd
}

// A watchedOutput ends the run when it cannot be written any more.
type watchedOutput struct {
	io.Writer
	end func()
}

func (w *watchedOutput) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	if err != nil {
		w.end()
	}
	return n, err
}

// goSource returns the directory of the Go standard library's source, or "".
func goSource() string {
	root := os.Getenv("GOROOT")
	if root == "" {
		out, err := exec.Command("go", "env", "GOROOT").Output()
		if err != nil {
			return ""
		}
		root = strings.TrimSpace(string(out))
	}
	dir := filepath.Join(root, "src")
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return ""
	}
	return dir
}

// isTerminal reports whether w is one.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
