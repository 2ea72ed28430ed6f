// Package lead does what one replica of the controller does for all: it makes
// and renews the certificates, takes start-up taints off nodes whose agent is
// ready, and tells users by Events what is wrong with their volumes. Routing
// needs no leader.
//
// # Support
//
//	Secret of the authority    CA certificates and keys: ca.crt, ca.key
//	Secret of the node agents  tls.crt, tls.key, ca.crt; mounted by every agent
//	Secret of the sidecar      the same for the snapshot metadata sidecar, which serves backup
//	                           programs; they find the CA in the SnapshotMetadataService
//	The controller's identity  made by each replica for itself, in memory
//
// The Secrets are part of the manifests and empty at first: so the controller
// needs the right to get and update these, and none to create or list.
//
// # Concurrency
//
// Run has one goroutine for each of its tasks and waits for them. A second
// leader, for the moment that a lost lease takes to be noticed, does no harm:
// every write names the version that it read.
//
// # Durability / Failure
//
// All state is in Kubernetes. A task that fails is repeated; its error is
// logged. Without a leader nothing stops: certificates have ten days left when
// they are renewed.
//
// # Spec
//
// Kubernetes API 1.36: coordination.k8s.io/v1 Lease, v1 Secret, v1 Node.
package lead
