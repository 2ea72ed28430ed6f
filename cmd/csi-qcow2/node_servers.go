package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"csi-qcow2/driver"
	"csi-qcow2/internal/pki"
)

// defaultRemotePort is where a node agent serves the controller of a cluster.
const defaultRemotePort = 9810

// serverFlags are the flags of what a node agent serves beside its socket.
type serverFlags struct {
	remote  string
	tlsDir  string
	metrics string
}

func (f *serverFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.remote, "remote-address", "", fmt.Sprintf("TCP address to serve the controller of a cluster on, such as :%d, over mutual TLS; empty for none", defaultRemotePort))
	flags.StringVar(&f.tlsDir, "tls-dir", "", "directory with tls.crt, tls.key and ca.crt for --remote-address; it is read at every handshake")
	flags.StringVar(&f.metrics, "metrics-address", "", "TCP address to serve /metrics and /healthz on; empty for none")
}

func (f *serverFlags) validate() error {
	var errs []error
	if (f.remote == "") != (f.tlsDir == "") {
		errs = append(errs, errors.New("--remote-address and --tls-dir: want both or neither"))
	}
	return errors.Join(append(errs, checkAddress("--remote-address", f.remote), checkAddress("--metrics-address", f.metrics))...)
}

// checkAddress refuses what is no address to listen on.
func checkAddress(flag, address string) error {
	if address == "" {
		return nil
	}
	if _, port, err := net.SplitHostPort(address); err != nil || port == "" {
		return fmt.Errorf("%s %q: want HOST:PORT or :PORT", flag, address)
	}
	return nil
}

// serve answers RPCs on the socket l, and what else the flags ask for, until
// ctx ends or one of the servers fails.
func (f *serverFlags) serve(ctx context.Context, d *driver.Driver, l net.Listener, drain time.Duration) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var (
		mu   sync.Mutex
		errs []error // guarded by mu
		all  sync.WaitGroup
	)
	start := func(serve func() error) {
		all.Go(func() {
			err := serve()
			stop()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	if f.remote != "" {
		remote, err := net.Listen("tcp", f.remote)
		if err != nil {
			return errors.Join(err, l.Close())
		}
		klog.InfoS("serving the controller", "address", remote.Addr().String())
		start(func() error {
			return d.ServeRemote(ctx, remote, pki.ServerConfig(pki.Files(f.tlsDir), pki.Controller), drain)
		})
	}
	if f.metrics != "" {
		start(func() error { return serveMetrics(ctx, f.metrics, d.Metrics()) })
	}
	start(func() error { return d.Serve(ctx, l, drain) })
	all.Wait()
	return errors.Join(errs...)
}
