package driver

import (
	"context"
	"time"

	"csi-qcow2/internal/freezer"
)

// Freeze implements Host.
func (linuxHost) Freeze(ctx context.Context, path string, device uint64, limit time.Duration, lock string) (Frozen, error) {
	f, err := freezer.Freeze(ctx, path, device, limit, lock)
	if err != nil {
		return nil, err
	}
	return f, nil
}

// ThawLeft implements Host.
func (linuxHost) ThawLeft(ctx context.Context, path string, device uint64, lock string) error {
	return freezer.ThawLeft(ctx, path, device, lock)
}
