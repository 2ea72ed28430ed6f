package driver

import (
	"context"
	"time"

	"csi-qcow2/internal/freezer"
)

// Freeze implements Host.
func (linuxHost) Freeze(ctx context.Context, path string, device uint64, limit time.Duration) (Frozen, error) {
	f, err := freezer.Freeze(ctx, path, device, limit)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ThawLeft implements Host.
func (linuxHost) ThawLeft(ctx context.Context, path string, device uint64) error {
	return freezer.ThawLeft(ctx, path, device)
}
