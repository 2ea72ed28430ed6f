package driver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

// A node agent that is called from afar says in its manifest (GetPluginInfo)
// who it is, and each call says in its metadata whom it is for. So a call that
// went to the wrong agent, because an address or a pool has moved, is refused
// with UNAVAILABLE: answered, a DeleteVolume of a volume that is not here would
// be a success.
const (
	ManifestNode  = "node"  // the agent's node ID
	ManifestPools = "pools" // the IDs of its pools (volume.Pool.ID), comma separated

	NodeHeader = "csi-qcow2-node" // the node ID that a call is for
	PoolHeader = "csi-qcow2-pool" // the pool that a call is for, if it is for one
)

// manifest is what GetPluginInfo tells of this agent.
func (d *Driver) manifest() map[string]string {
	ids := make([]string, 0, len(d.pools.byID))
	for id := range d.pools.byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return map[string]string{ManifestNode: d.opts.NodeID, ManifestPools: strings.Join(ids, ",")}
}

// checkAddress refuses a call that is for another agent. GetPluginInfo asks who
// this one is.
func (d *Driver) checkAddress(ctx context.Context, method string) error {
	if method == csi.Identity_GetPluginInfo_FullMethodName {
		return nil
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if nodes := md.Get(NodeHeader); len(nodes) != 1 || nodes[0] != d.opts.NodeID {
		return toStatus(fmt.Errorf("%w: the call is for node %q, this is the agent of %q", errUnavailable, nodes, d.opts.NodeID))
	}
	for _, pool := range md.Get(PoolHeader) {
		if d.pools.byID[pool] == nil {
			return toStatus(fmt.Errorf("%w: node %s has no pool %q now", errUnavailable, d.opts.NodeID, pool))
		}
	}
	return nil
}

// The least time between two pings of a caller that wants to know whether the
// node is still there, and how long this side waits for a sign of the caller.
const (
	minPing   = 5 * time.Second
	callerAge = 30 * time.Second
)

// ServeRemote answers the RPCs of the controller on l, with TLS as config says,
// until ctx ends; then as Serve. The Node service is not among them.
func (d *Driver) ServeRemote(ctx context.Context, l net.Listener, config *tls.Config, drain time.Duration) error {
	s := grpc.NewServer(append([]grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(config)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: callerAge, Timeout: callerAge}),
		grpc.MaxConcurrentStreams(256),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := d.checkAddress(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if err := d.checkAddress(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handler(srv, stream)
		}),
	}, d.ServerOptions()...)...)
	d.RegisterController(s)
	return d.serve(ctx, s, l, drain)
}

// serve runs s on l until ctx ends. Then it refuses new calls and waits for
// those under way, at most drain.
func (d *Driver) serve(ctx context.Context, s *grpc.Server, l net.Listener, drain time.Duration) error {
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }() // ends when s stops
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer cancel()
	err := d.Drain(ctx)
	s.Stop()
	if serveErr := <-served; !errors.Is(serveErr, grpc.ErrServerStopped) { // it had not begun yet
		err = errors.Join(err, serveErr)
	}
	return err
}

// Capabilities answers for every agent of this version, without one: what a
// driver can do does not depend on a node.
type Capabilities struct{}

// Plugin is Identity.GetPluginCapabilities.
func (Capabilities) Plugin(ctx context.Context) (*csi.GetPluginCapabilitiesResponse, error) {
	return identityServer{}.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
}

// Controller is Controller.ControllerGetCapabilities.
func (Capabilities) Controller(ctx context.Context) (*csi.ControllerGetCapabilitiesResponse, error) {
	return controllerServer{}.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
}
