package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// nodeName is the cluster's only node.
func nodeName() string { return os.Getenv("NODE") }

// restart kills a daemon of the cluster with SIGKILL; its supervisor starts it again.
func restart(t *testing.T, daemon string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), filepath.Join(os.Getenv("CLUSTER"), "restart.sh"), daemon).CombinedOutput()
	if err != nil {
		t.Fatalf("restart %s: %v: %s", daemon, err, out)
	}
}

// kill kills the processes of the node that match; there must be one.
func kill(t *testing.T, what string, match func(cmdline []string, cgroup string) bool) {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || len(line) == 0 {
			continue // it ended, or is the kernel's
		}
		cgroup, err := os.ReadFile(filepath.Join(filepath.Dir(name), "cgroup"))
		if err != nil || !match(strings.Split(string(line), "\x00"), string(cgroup)) {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(name, "/")[2])
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed++
	}
	if killed == 0 {
		t.Fatalf("no process to kill: %s", what)
	}
}

// killAgent kills the node agent and waits until the kubelet has started the
// next one, and it serves.
func killAgent(t *testing.T) {
	t.Helper()
	before := agentRestarts(t)
	kill(t, "the node agent", func(cmdline []string, _ string) bool {
		return cmdline[0] == "/bin/csi-qcow2" && cmdline[1] == "node"
	})
	eventually(t, "restart of the node agent", func(ctx context.Context) error {
		if n := agentRestarts(t); n == before {
			return fmt.Errorf("the agent was restarted %d times, as before", n)
		}
		return agentReady(ctx)
	})
}

// replacePod deletes the pod of a component of the node and waits until the next
// one is ready, and the agent serves, its volumes held.
func replacePod(t *testing.T, component string) {
	t.Helper()
	old, err := podOf(t.Context(), component)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.CoreV1().Pods(driverNamespace).Delete(t.Context(), old.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	agent := csi.NewNodeClient(dialAgent(t))
	eventually(t, "next pod of the "+component, func(ctx context.Context) error {
		next, err := podOf(ctx, component)
		if err != nil {
			return err
		}
		if next.UID == old.UID || !podReady(next) {
			return fmt.Errorf("pod %s is there and not ready, pod %s was deleted", next.Name, old.Name)
		}
		if err := agentReady(ctx); err != nil {
			return err
		}
		return allHeld(ctx, agent)
	})
}

// allHeld reports whether every volume of the cluster would outlive the agent.
func allHeld(ctx context.Context, agent csi.NodeClient) error {
	volumes, err := client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, v := range volumes.Items {
		if v.Status.Phase != corev1.VolumeBound {
			continue
		}
		resp, err := agent.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: v.Spec.CSI.VolumeHandle})
		if err != nil {
			return err
		}
		if sick := resp.GetVolumeHealth().GetHealthStatuses(); len(sick) > 0 {
			return fmt.Errorf("volume %s: %v", v.Name, sick)
		}
	}
	return nil
}

// podOf returns the pod of a component of the node.
func podOf(ctx context.Context, component string) (*corev1.Pod, error) {
	pods, err := client.CoreV1().Pods(driverNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		return nil, err
	}
	if len(pods.Items) != 1 {
		return nil, fmt.Errorf("%d pods of component %s, want 1", len(pods.Items), component)
	}
	return &pods.Items[0], nil
}

// agentPod returns the pod of the node agent.
func agentPod(ctx context.Context) (*corev1.Pod, error) { return podOf(ctx, "node") }

// agentReady reports whether all containers of the agent's pod are ready.
func agentReady(ctx context.Context) error {
	p, err := agentPod(ctx)
	if err != nil {
		return err
	}
	if len(p.Status.ContainerStatuses) != len(p.Spec.Containers) {
		return fmt.Errorf("pod %s has no status yet", p.Name)
	}
	for _, c := range p.Status.ContainerStatuses {
		if !c.Ready {
			return fmt.Errorf("container %s of pod %s is not ready", c.Name, p.Name)
		}
	}
	return nil
}

// agentRestarts returns how often the agent's container was started again.
func agentRestarts(t *testing.T) int32 {
	t.Helper()
	p, err := agentPod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == "driver" {
			return c.RestartCount
		}
	}
	t.Fatalf("pod %s has no container driver", p.Name)
	return 0
}

// kubeletStats reads the kubelet's summary of its pods.
func kubeletStats(ctx context.Context, into any) error {
	body, err := client.CoreV1().RESTClient().Get().Resource("nodes").Name(nodeName()).SubResource("proxy").Suffix("stats/summary").DoRaw(ctx)
	if err != nil {
		return err
	}
	return json.Unmarshal(body, into)
}
