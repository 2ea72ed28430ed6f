package router

import (
	"cmp"
	"context"
	"hash/fnv"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// CreateVolume implements csi.ControllerServer. The same request goes to the
// same node: a retry finds what an earlier attempt has made. So there is no
// second choice when a node is full or down.
func (s controllerServer) CreateVolume(ctx context.Context, req *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	if source := sourceOf(req.GetVolumeContentSource()); source != "" {
		g, ctx, err := s.owner(ctx, source)
		if err != nil {
			return nil, err
		}
		nodes := s.nodesOf(req.GetAccessibilityRequirements().GetRequisite())
		if len(nodes) > 0 && !slices.Contains(nodes, g.node) {
			return nil, status.Errorf(codes.ResourceExhausted,
				"source %s is in a pool of node %s, and a restore or clone is made where its source is; the request allows %s only",
				source, g.node, strings.Join(nodes, ", "))
		}
		return csi.NewControllerClient(g.conn).CreateVolume(ctx, req)
	}
	g, err := s.nodeFor(req)
	if err != nil {
		return nil, err
	}
	return csi.NewControllerClient(g.conn).CreateVolume(ctx, req)
}

// sourceOf returns the ID of what a volume is to be made from, or "".
func sourceOf(s *csi.VolumeContentSource) string {
	if id := s.GetSnapshot().GetSnapshotId(); id != "" {
		return id
	}
	return s.GetVolume().GetVolumeId()
}

// nodeFor returns the agent that makes a volume from nothing.
func (r *Router) nodeFor(req *csi.CreateVolumeRequest) (*agent, error) {
	topology := req.GetAccessibilityRequirements()
	for _, terms := range [][]*csi.Topology{topology.GetPreferred(), topology.GetRequisite()} {
		if nodes := r.nodesOf(terms); len(nodes) > 0 {
			return r.onNode(nodes[0])
		}
	}
	if len(topology.GetRequisite())+len(topology.GetPreferred()) > 0 {
		return nil, status.Errorf(codes.ResourceExhausted, "no topology of the request has a segment %s", r.topologyKey())
	}
	all, err := r.agents.all()
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, status.Error(codes.Unavailable, "no node has an agent now")
	}
	return slices.MaxFunc(all, func(a, b *agent) int {
		return cmp.Compare(weight(a.node, req.GetName()), weight(b.node, req.GetName()))
	}), nil
}

// weight orders the nodes for a name, each name in another order, and the same
// with every set of nodes.
func weight(node, name string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(name))
	h.Write([]byte{0})
	h.Write([]byte(node))
	return h.Sum32()
}

// nodesOf returns the nodes that terms name.
func (r *Router) nodesOf(terms []*csi.Topology) []string {
	var nodes []string
	for _, t := range terms {
		if node := t.GetSegments()[r.topologyKey()]; node != "" {
			nodes = append(nodes, node)
		}
	}
	return nodes
}
