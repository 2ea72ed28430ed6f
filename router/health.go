package router

import (
	"context"
	"errors"
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// Unhealthy returns the volumes that something is wrong with, as far as agents
// answer; the error names those that do not. Unlike a list, what is missing
// here is not taken for gone.
func (r *Router) Unhealthy(ctx context.Context) ([]*csi.VolumeHealth, error) {
	agents, err := r.agents.all()
	if err != nil {
		return nil, err
	}
	var all []*csi.VolumeHealth
	var errs []error
	for _, g := range agents {
		look, cancel := context.WithTimeout(ctx, identifyTimeout)
		resp, err := csi.NewControllerClient(g.conn).ControllerListVolumeHealth(look, &csi.ControllerListVolumeHealthRequest{})
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("health of volumes: %w", err))
		}
		all = append(all, resp.GetEntries()...)
	}
	return all, errors.Join(errs...)
}
