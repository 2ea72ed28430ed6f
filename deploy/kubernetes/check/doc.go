// Package check renders the manifests beside it with kustomize, as an operator
// would, and holds them against the types of the Kubernetes API and against
// the rules that keep the node agent safe. It has tests only.
//
// It is a module of its own, so that kustomize and the API types, which
// nothing of the driver needs, are not requirements of the driver.
//
// # Support
//
// The kustomizations overlays/* and examples, and the components on top of them. An object must be of a
// kind whose type is known here, and may have no field that the type lacks.
// Every rule has a change of the manifests that it must notice.
//
// # Spec
//
// Kubernetes API 1.36, snapshot.storage.k8s.io/v1, groupsnapshot.storage.k8s.io/v1,
// cbt.storage.k8s.io/v1beta1.
package check
