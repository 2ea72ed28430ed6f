// Package router serves the controller side of CSI for a whole cluster. Each
// volume belongs to one node agent; the router finds it and forwards the call
// over gRPC with mutual TLS. It has no state: which agents there are is read
// from Kubernetes, which pools they have is asked of them, and a volume's ID
// names its pool.
//
// # Support
//
//	Identity            answered here
//	Controller          CreateVolume: to the node of the content source, else to the first
//	                    preferred topology; ListVolumes, ListSnapshots,
//	                    ControllerListVolumeHealth, GetCapacity: to all nodes; the rest by ID
//	GroupController     to the one node of all members
//	SnapshotMetadata    by ID; streams are passed on as they are read
//	Node                not served: kubelet calls the agent of its own node
//
// # Terms
//
// An agent is the node process of one node, found as a ready or unready Pod. An
// agent is known once it has said which pools it has. The leader is the one
// replica that renews certificates and removes start-up taints; all replicas
// route.
//
// # Concurrency
//
// A Router may be used by many goroutines at once. It orders nothing: that a
// volume changes once at a time is its agent's business. Lock order: agents.mu,
// then agent.mu; neither is held over a call.
//
// # Durability / Failure
//
// A pool that no known agent has is UNAVAILABLE and never NOT_FOUND: its node
// may be down, and a DeleteVolume that succeeds for want of a node would lose
// the volume. The same holds for lists: one agent that does not answer fails
// the whole list, because a CO takes what is not in it for gone. Deadlines go
// with the calls. A connection whose node has vanished is noticed by pings,
// and its calls fail with UNAVAILABLE.
//
// Replicas may route the same call at once; IDs are made from names, so both
// arrive at the same volume.
//
// # Spec
//
// Container Storage Interface v1.13.0, github.com/container-storage-interface/spec.
package router
