package router

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"csi-qcow2/driver"
	"csi-qcow2/volume"
)

// identifyTimeout bounds how long a call waits for agents that do not say
// which pools they have; the one that it is for may have answered long before.
const identifyTimeout = 3 * time.Second

// errForeign says that an ID is not one of ours. No pool can have it.
func errForeign(id string) error { return status.Errorf(codes.NotFound, "not found: %q", id) }

// owner returns the agent that has the pool of a volume or snapshot ID, and a
// context that says so to it.
func (r *Router) owner(ctx context.Context, id string) (*agent, context.Context, error) {
	if id == "" {
		return nil, nil, status.Error(codes.InvalidArgument, "the ID is missing")
	}
	pool, err := volume.PoolOf(id)
	if err != nil {
		return nil, nil, errForeign(id)
	}
	g, err := r.withPool(ctx, pool)
	if err != nil {
		return nil, nil, err
	}
	return g, metadata.AppendToOutgoingContext(ctx, driver.PoolHeader, pool), nil
}

// withPool returns the agent that has pool.
func (r *Router) withPool(ctx context.Context, pool string) (*agent, error) {
	all, err := r.agents.all()
	if err != nil {
		return nil, err
	}
	var unknown []*agent
	for _, g := range all {
		has, known := g.has(pool)
		if has {
			return g, nil
		}
		if !known {
			unknown = append(unknown, g)
		}
	}
	silent := identifyAll(ctx, unknown)
	for _, g := range unknown {
		if has, _ := g.has(pool); has {
			return g, nil
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	if len(silent) > 0 {
		return nil, status.Errorf(codes.Unavailable,
			"pool %s is on none of the nodes whose agents answer (%d of %d); no answer from %s", pool, len(all)-len(silent), len(all), strings.Join(silent, ", "))
	}
	return nil, status.Errorf(codes.Unavailable,
		"pool %s is on none of the %d nodes with an agent: its node is down or has left the cluster", pool, len(all))
}

// identifyAll asks agents for their pools, all at once, and returns the nodes
// of those that did not answer.
func identifyAll(ctx context.Context, agents []*agent) (silent []string) {
	ctx, cancel := context.WithTimeout(ctx, identifyTimeout)
	defer cancel()
	errs := make([]error, len(agents))
	var asked sync.WaitGroup
	for i, g := range agents {
		asked.Go(func() { errs[i] = g.identify(ctx) })
	}
	asked.Wait()
	for i, err := range errs {
		if err != nil {
			silent = append(silent, agents[i].node)
		}
	}
	return silent
}

// onNode returns the agent of node.
func (r *Router) onNode(node string) (*agent, error) {
	all, err := r.agents.all()
	if err != nil {
		return nil, err
	}
	for _, g := range all {
		if g.node == node {
			return g, nil
		}
	}
	return nil, status.Errorf(codes.Unavailable, "node %s has no agent now", node)
}

// Ready returns nil when the agent of node answers that it can serve.
func (r *Router) Ready(ctx context.Context, node string) error {
	g, err := r.onNode(node)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, identifyTimeout)
	defer cancel()
	resp, err := csi.NewIdentityClient(g.conn).Probe(ctx, &csi.ProbeRequest{})
	if err == nil && resp.GetReady() != nil && !resp.GetReady().GetValue() {
		err = status.Errorf(codes.Unavailable, "the agent of node %s is not ready", node)
	}
	return err
}
