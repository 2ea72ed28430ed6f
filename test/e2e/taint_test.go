package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// startupTaint keeps pods away from a node until its agent serves.
const startupTaint = driverName + "/agent-not-ready"

// TestStartupTaint: on a node with the start-up taint a pod waits while there is
// no agent; when the agent serves, the controller takes the taint off, and the pod runs.
func TestStartupTaint(t *testing.T) {
	onlyStandard(t, "only its controller takes the taint off")
	s := newSpace(t)
	if tainted(t) {
		t.Fatal("the node has the start-up taint although its agent serves")
	}
	// No node has this label, so there is no agent.
	setAgentSelector(t, `"nobody"`)
	t.Cleanup(func() { setAgentSelector(t, `null`); awaitAgent(t) })
	eventually(t, "end of the node agent", func(ctx context.Context) error {
		pods, err := client.CoreV1().Pods(driverNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=node"})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("pod %s is there", pods.Items[0].Name)
		}
		return err
	})
	patchNode(t, types.StrategicMergePatchType, fmt.Sprintf(`{"spec":{"taints":[{"key":%q,"effect":"NoExecute"}]}}`, startupTaint))

	s.claim("data", "32Mi")
	s.submit("pod", s.withClaim("data"))
	s.event("Pod", "pod", "untolerated taint")
	if !tainted(t) {
		t.Fatal("the taint is gone, and there is no agent")
	}
	setAgentSelector(t, `null`)
	s.running("pod")
	if tainted(t) {
		t.Fatal("the pod runs, and the taint is still there")
	}
}

func tainted(t *testing.T) bool {
	t.Helper()
	n, err := client.CoreV1().Nodes().Get(t.Context(), nodeName(), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(n.Spec.Taints, func(taint corev1.Taint) bool { return taint.Key == startupTaint })
}

func patchNode(t *testing.T, kind types.PatchType, patch string) {
	t.Helper()
	if _, err := client.CoreV1().Nodes().Patch(t.Context(), nodeName(), kind, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// setAgentSelector wants a label of the nodes that have an agent, or with null no longer.
func setAgentSelector(t *testing.T, value string) {
	t.Helper()
	patchAgents(t, types.StrategicMergePatchType, `{"spec":{"template":{"spec":{"nodeSelector":{"e2e":`+value+`}}}}}`)
}

// patchAgents changes the DaemonSet of the node agents. The test may have ended.
func patchAgents(t *testing.T, kind types.PatchType, patch string) {
	t.Helper()
	if _, err := client.AppsV1().DaemonSets(driverNamespace).Patch(context.Background(), "csi-qcow2-node", kind, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// awaitAgent waits until the agents are those that the DaemonSet wants.
func awaitAgent(t *testing.T) {
	t.Helper()
	eventually(t, "node agent", func(ctx context.Context) error {
		set, err := client.AppsV1().DaemonSets(driverNamespace).Get(ctx, "csi-qcow2-node", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := set.Status; s.ObservedGeneration != set.Generation || s.DesiredNumberScheduled != 1 || s.UpdatedNumberScheduled != 1 || s.NumberAvailable != 1 {
			return fmt.Errorf("the DaemonSet's status is %+v", s)
		}
		return agentReady(ctx)
	})
}
