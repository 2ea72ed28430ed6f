package driver

import (
	"fmt"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// TopologyKey is the label of a node whose value is its node ID, for the
// driver called name.
func TopologyKey(name string) string { return "topology." + name + "/node" }

func (d *Driver) topologyKey() string { return TopologyKey(d.opts.Name) }

// topology says where the volumes of this driver can be used: here.
func (d *Driver) topology() *csi.Topology {
	return &csi.Topology{Segments: map[string]string{d.topologyKey(): d.opts.NodeID}}
}

// checkTopology refuses a request that cannot be satisfied on this node.
func (d *Driver) checkTopology(r *csi.TopologyRequirement) error {
	if len(r.GetRequisite()) == 0 {
		return nil
	}
	for _, t := range r.GetRequisite() {
		if d.holds(t) {
			return nil
		}
	}
	return fmt.Errorf("%w: no requisite topology is %s=%s", errTopology, d.topologyKey(), d.opts.NodeID)
}

// holds reports whether this node is in t.
func (d *Driver) holds(t *csi.Topology) bool {
	for key, value := range t.GetSegments() {
		if key == d.topologyKey() && value != d.opts.NodeID {
			return false
		}
	}
	_, named := t.GetSegments()[d.topologyKey()]
	return named || len(t.GetSegments()) == 0
}
