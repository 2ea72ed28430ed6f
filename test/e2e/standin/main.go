// Command standin takes the place of CSI sidecars that cannot be built from a
// Go module:
//
//	standin csi-node-driver-registrar   registers the driver with the kubelet
//	standin livenessprobe               answers /healthz with the driver's Probe
//	standin NAME                        says that NAME is absent, and waits
//
// It has the flags of the originals that deploy/kubernetes uses, and ignores
// those of a sidecar it does not know. With --is-standin it only says, by its
// exit status, whether it can take the place of NAME.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// parts are the sidecars that this program can take the place of.
var parts = map[string]func(ctx context.Context, args []string) error{
	"csi-node-driver-registrar": register,
	"livenessprobe":             probe,
}

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: standin NAME [FLAG...]")
	}
	name, args := os.Args[1], os.Args[2:]
	run, ok := parts[name]
	if slices.Contains(args, "--is-standin") {
		if !ok {
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if !ok {
		log.Printf("%s is ABSENT: put its program into the directory that SIDECARS names", name)
		<-ctx.Done()
		return
	}
	if err := run(ctx, args); err != nil {
		log.Fatalf("%s: %v", name, err)
	}
}

// dial connects to the driver's socket.
func dial(path string) (*grpc.ClientConn, error) {
	if path == "" {
		return nil, fmt.Errorf("--csi-address is required")
	}
	return grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
}
