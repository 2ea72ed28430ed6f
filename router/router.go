package router

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	corelisters "k8s.io/client-go/listers/core/v1"

	"csi-qcow2/driver"
)

// Options configure a Router. All fields without a default are required.
type Options struct {
	Name    string // of the driver, default driver.DefaultName
	Version string // of this program
	// Agents lists the Pods of the node agents, and no others.
	Agents corelisters.PodNamespaceLister
	// Port is where agents serve the controller.
	Port int
	// TLS calls agents; see pki.ClientConfig.
	TLS *tls.Config
	// Observe is told of each call to an agent; nil for nobody.
	Observe Observe
}

// An Observe is told that a call of method to node ended with err after took.
type Observe func(method, node string, err error, took time.Duration)

// A Router serves CSI for a cluster.
type Router struct {
	opts   Options
	agents agents
	calls  calls
}

// New returns a Router.
func New(o Options) (*Router, error) {
	if o.Name == "" {
		o.Name = driver.DefaultName
	}
	switch {
	case !driver.ValidName(o.Name):
		return nil, fmt.Errorf("router: driver name %q: want a domain name of at most 63 characters", o.Name)
	case o.Port < 1 || o.Port > 65535:
		return nil, fmt.Errorf("router: port %d: want 1 to 65535", o.Port)
	}
	return &Router{opts: o, agents: newAgents(o)}, nil
}

// Serve answers RPCs on l until ctx ends. Then it refuses new ones and waits
// for those under way, at most drain. It closes l and all connections.
func (r *Router) Serve(ctx context.Context, l net.Listener, drain time.Duration) error {
	s := grpc.NewServer(grpc.ChainUnaryInterceptor(driver.LogCalls, r.calls.admit), grpc.ChainStreamInterceptor(r.calls.admitStream))
	r.Register(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }() // ends when s stops
	var err error
	select {
	case err := <-served:
		return errors.Join(err, r.Close())
	case <-ctx.Done():
	}
	if !r.calls.drain(drain) {
		err = fmt.Errorf("router: calls did not end in %s", drain)
	}
	s.Stop()
	if serveErr := <-served; !errors.Is(serveErr, grpc.ErrServerStopped) { // it had not begun yet
		err = errors.Join(err, serveErr)
	}
	return errors.Join(err, r.Close())
}

// Register adds the services of the router to a server.
func (r *Router) Register(s *grpc.Server) {
	csi.RegisterIdentityServer(s, identityServer{Router: r})
	csi.RegisterControllerServer(s, controllerServer{Router: r})
	csi.RegisterGroupControllerServer(s, groupServer{Router: r})
	csi.RegisterSnapshotMetadataServer(s, metadataServer{Router: r})
}

// Close closes the connections to agents.
func (r *Router) Close() error { return r.agents.close() }

// topologyKey is the label of a node whose value is its node ID.
func (r *Router) topologyKey() string { return driver.TopologyKey(r.opts.Name) }
