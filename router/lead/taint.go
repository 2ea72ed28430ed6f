package lead

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/klog/v2"
)

// Taints takes the start-up taint off nodes that can serve volumes. Kubelet
// puts it on when told so (--register-with-taints), and keeps pods away that
// would find no driver.
type Taints struct {
	Nodes  typedcorev1.NodeInterface
	Lister corelisters.NodeLister
	Key    string // of the taint
	Label  string // which kubelet gives the node when the agent has registered with it
	// Ready asks the agent of a node.
	Ready func(ctx context.Context, node string) error
}

// Remove looks at all nodes once.
func (t *Taints) Remove(ctx context.Context) error {
	nodes, err := t.Lister.List(labels.Everything())
	if err != nil {
		return err
	}
	var errs []error
	for _, node := range nodes {
		_, registered := node.Labels[t.Label]
		if !registered || !slices.ContainsFunc(node.Spec.Taints, t.ours) {
			continue
		}
		if err := t.Ready(ctx, node.Name); err != nil {
			errs = append(errs, fmt.Errorf("start-up taint of node %s stays: %w", node.Name, err))
			continue
		}
		errs = append(errs, t.remove(ctx, node))
	}
	return errors.Join(errs...)
}

func (t *Taints) ours(taint corev1.Taint) bool { return taint.Key == t.Key }

// remove patches the taints of node, unless another has changed them.
func (t *Taints) remove(ctx context.Context, node *corev1.Node) error {
	patch, err := json.Marshal([]map[string]any{
		{"op": "test", "path": "/spec/taints", "value": node.Spec.Taints},
		{"op": "replace", "path": "/spec/taints", "value": slices.DeleteFunc(slices.Clone(node.Spec.Taints), t.ours)},
	})
	if err != nil {
		return err
	}
	if _, err := t.Nodes.Patch(ctx, node.Name, types.JSONPatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("start-up taint of node %s: %w", node.Name, err)
	}
	klog.FromContext(ctx).Info("start-up taint removed", "node", node.Name)
	return nil
}
