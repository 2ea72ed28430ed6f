// Package e2e runs the driver on a real Kubernetes of one node: with its pods
// from deploy/kubernetes, real sidecars, the real kubelet and real pods that
// use volumes. It has tests only; hack/e2e.sh makes the cluster and runs them
// inside its namespaces (make test-e2e).
//
// # Support
//
// What a cluster's users do with volumes, and what happens to a node: volumes
// and their modes, snapshots, clones, expansion, deletion in every order,
// restarts of pods, kubelet and driver, and pools that are full. Kubernetes'
// own external storage suite runs beside it; docs/e2e.md lists what of it is
// left out.
//
// # Terms
//
// A space is the namespace of one test. It ends with a look at what it left:
// volumes and snapshots must be gone from the cluster and from the pool.
//
// # Concurrency
//
// Tests that restart something of the node run alone, the others beside each
// other.
package e2e
