package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// Exit codes of every subcommand that does not imitate a QEMU tool.
const (
	exitOK    = 0
	exitError = 1 // the work failed
	exitUsage = 2 // unknown command or flag, bad value
)

// An exitError carries an exit code of its own; Err may be nil when the
// subcommand has said everything already.
type codedError struct {
	code int
	err  error
}

func (e *codedError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *codedError) Unwrap() error { return e.err }

// usageErrorf returns an error that ends the process with exit code 2.
func usageErrorf(format string, args ...any) error {
	return &codedError{exitUsage, fmt.Errorf(format, args...)}
}

// noArguments refuses what stands behind the flags of a subcommand.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageErrorf("%s takes no argument, got %q", cmd.Name(), args[0])
	}
	return nil
}

// run runs the command line args and returns the exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var coded *codedError
	if errors.As(err, &coded) {
		if coded.err != nil {
			fmt.Fprintf(stderr, "csi-qcow2: %v\n", coded.err)
		}
		return coded.code
	}
	fmt.Fprintf(stderr, "csi-qcow2: %v\n", err)
	return exitError
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "csi-qcow2",
		Short:         "Kubernetes block storage in qcow2 files",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("unknown command %q; see csi-qcow2 help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageErrorf("%v", err) })
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(
		newControllerCommand(),
		newDemoCommand(),
		newHolderCommand(),
		newImgCommand(),
		newNBDCommand(),
		newNodeCommand(),
		newVersionCommand(),
		newVolumeCommand(),
	)
	return root
}
