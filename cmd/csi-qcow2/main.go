// Command csi-qcow2 is a CSI driver whose volumes are qcow2 images, and the
// tools that belong to it. Run `csi-qcow2 help`.
package main

import (
	"context"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/aside"
	"csi-qcow2/internal/freezer"
)

func main() {
	for _, childMain := range []func() (int, bool){aside.Main, freezer.Main} {
		if status, child := childMain(); child {
			os.Exit(status)
		}
	}
	if len(os.Args) > 1 && os.Args[1] == "node" {
		markThreads()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}
