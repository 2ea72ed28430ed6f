package router

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"csi-qcow2/volume"
)

// Unhealthy returns the volumes that something is wrong with, as far as agents
// answer; asked reports whether the agent that has a volume did. The error names
// those that did not. Unlike a list, what is missing here is not taken for gone.
func (r *Router) Unhealthy(ctx context.Context) (all []*csi.VolumeHealth, asked func(id string) bool, err error) {
	agents, err := r.agents.all()
	if err != nil {
		return nil, nil, err
	}
	var answered []*agent
	var errs []error
	for _, g := range agents {
		some, err := g.unhealthy(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("health of volumes: %w", err))
			continue
		}
		all, answered = append(all, some...), append(answered, g)
	}
	return all, func(id string) bool {
		pool, err := volume.PoolOf(id)
		return err == nil && slices.ContainsFunc(answered, func(g *agent) bool { has, _ := g.has(pool); return has })
	}, errors.Join(errs...)
}

// unhealthy asks g for its volumes that something is wrong with, and for its pools
// when they are not known.
func (g *agent) unhealthy(ctx context.Context) ([]*csi.VolumeHealth, error) {
	ctx, cancel := context.WithTimeout(ctx, identifyTimeout)
	defer cancel()
	if _, known := g.has(""); !known {
		if err := g.identify(ctx); err != nil {
			return nil, err
		}
	}
	resp, err := csi.NewControllerClient(g.conn).ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{})
	return resp.GetEntries(), err
}
