package driver

import (
	"fmt"
	"slices"
	"strings"

	"csi-qcow2/volume"
)

// defaultPool is the pool of a StorageClass that names none, when there is more than one.
const defaultPool = "default"

// pools finds the pool of a name or of a volume or snapshot ID.
type pools struct {
	byName map[string]*volume.Pool
	byID   map[string]*volume.Pool // by volume.Pool.ID
	names  []string                // sorted
}

func newPools(byName map[string]*volume.Pool) (pools, error) {
	p := pools{byName: byName, byID: make(map[string]*volume.Pool)}
	for name, pool := range byName {
		if other := p.byID[pool.ID()]; other != nil {
			return pools{}, fmt.Errorf("pools %q and %q have the same ID %s: one is a copy of the other", other.Path(), pool.Path(), pool.ID())
		}
		p.byID[pool.ID()] = pool
		p.names = append(p.names, name)
	}
	slices.Sort(p.names)
	return p, nil
}

// named returns the pool that a StorageClass asks for.
func (p pools) named(name string, given bool) (*volume.Pool, error) {
	if !given {
		if len(p.names) == 1 {
			name = p.names[0]
		} else {
			name = defaultPool
		}
	}
	if pool := p.byName[name]; pool != nil {
		return pool, nil
	}
	return nil, fmt.Errorf("%w: parameter pool=%q: this node has %s", errNoPool, name, strings.Join(p.names, ", "))
}

// of returns the pool of the ID of a volume, snapshot or group snapshot. What is not an ID of ours is
// not found: a CO cannot tell the two apart either.
func (p pools) of(id string) (*volume.Pool, error) {
	pool8, err := volume.PoolOf(id)
	if err != nil || p.byID[pool8] == nil {
		return nil, fmt.Errorf("%w: %q", volume.ErrNotFound, id)
	}
	return p.byID[pool8], nil
}

// here is of for those who act when something is gone. Only where its pool is can that
// be said of something of ours: of a pool whose disk is not mounted nothing is gone.
func (p pools) here(id string) (*volume.Pool, error) {
	pool, err := p.of(id)
	if pool8, notOurs := volume.PoolOf(id); err != nil && notOurs == nil {
		return nil, fmt.Errorf("%w: %s is in the pool %s, which this node does not have now; bring that back, or, if it is lost, remove what Kubernetes keeps of it by hand",
			errUnavailable, id, pool8)
	}
	return pool, err
}

// all returns the pools in name order.
func (p pools) all() []*volume.Pool {
	all := make([]*volume.Pool, len(p.names))
	for i, name := range p.names {
		all[i] = p.byName[name]
	}
	return all
}
