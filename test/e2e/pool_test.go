package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// capacityOf returns what the cluster knows of the room for a StorageClass on
// the node.
func capacityOf(ctx context.Context, class string) (*storagev1.CSIStorageCapacity, error) {
	all, err := client.StorageV1().CSIStorageCapacities(driverNamespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for i, c := range all.Items {
		if c.StorageClassName == class && c.NodeTopology != nil && c.NodeTopology.MatchLabels[topologyKey] == nodeName() {
			return &all.Items[i], nil
		}
	}
	return nil, fmt.Errorf("no CSIStorageCapacity for class %s on node %s among %d", class, nodeName(), len(all.Items))
}

// free returns the bytes that are free in a pool's filesystem.
func free(t *testing.T, dir string) int64 {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	return int64(fs.Bavail) * fs.Bsize
}

// TestCapacity: the scheduler knows each pool's room, and a claim that has none
// anywhere says so.
func TestCapacity(t *testing.T) {
	t.Parallel()
	for class, dir := range map[string]string{classDefault: poolDir, classSmall: smallPoolDir} {
		eventually(t, "capacity of "+class, func(ctx context.Context) error {
			c, err := capacityOf(ctx, class)
			if err != nil {
				return err
			}
			// Other tests use the pool meanwhile.
			if got, want := c.Capacity.Value(), free(t, dir); got > want*11/10 || got < want/2 {
				return fmt.Errorf("capacity is %d, the pool has %d", got, want)
			}
			return nil
		})
	}
	s := newSpace(t)
	s.claim("huge", "9999Ti")
	s.submit("pod", s.withClaim("huge"))
	s.event("Pod", "pod", "did not have enough free storage")
	if phase := s.getClaim("huge").Status.Phase; phase != corev1.ClaimPending {
		t.Fatalf("claim without room is %s, want Pending", phase)
	}
}

// TestPoolFull: a pod that fills the pool's disk is told so, the driver lives
// on, what was synced before stays, and room that is given back can be used.
func TestPoolFull(t *testing.T) {
	s := newSpace(t)
	s.claim("data", "256Mi", class(classSmall))
	s.claim("more", "256Mi", class(classSmall))
	s.start("pod", s.withClaim("data"))
	s.start("other", s.withClaim("more"))
	sum := s.write("pod", mountPath+"/before", 16)

	// Two volumes of 256 MiB on a disk of 320 MiB: neither is full when the disk is.
	s.write("other", mountPath+"/ballast", 150)
	out, err := s.try("pod", "dd if=/dev/urandom of="+mountPath+"/noise bs=1M count=170 conv=fsync 2>&1")
	if err == nil {
		t.Fatalf("the pool's disk took more than it has, %d bytes are left: %s", free(t, smallPoolDir), out)
	}
	t.Logf("a write beyond the pool's room: %v: %s", err, out)
	s.toldFull("data")
	eventually(t, "capacity of the full pool", func(ctx context.Context) error {
		c, err := capacityOf(ctx, classSmall)
		if err != nil {
			return err
		}
		if got := c.Capacity.Value(); got > 32<<20 {
			return fmt.Errorf("capacity is %d", got)
		}
		return nil
	})
	s.claim("late", "100Mi", class(classSmall))
	s.submit("late", s.withClaim("late"))
	s.event("Pod", "late", "did not have enough free storage")
	s.want("content from before", s.sum("pod", mountPath+"/before", 16), sum)
	if err := agentReady(t.Context()); err != nil {
		t.Fatal(err)
	}

	// Room comes back, and the volume that met the end of the pool works again,
	// at the latest in a new pod.
	s.stop("other")
	s.deleteClaim("more")
	eventually(t, "room in the pool", func(context.Context) error {
		if n := free(t, smallPoolDir); n < 100<<20 {
			return fmt.Errorf("%d bytes are free", n)
		}
		return nil
	})
	s.stop("pod")
	s.start("pod", s.withClaim("data"))
	s.want("content from before", s.sum("pod", mountPath+"/before", 16), sum)
	s.sh("pod", "rm -f "+mountPath+"/noise")
	s.write("pod", mountPath+"/after", 16)
	s.running("late")
	s.toldWell("data")
}

// toldFull checks that all who ask are told that the claim's pool is full.
func (s *space) toldFull(claim string) {
	s.t.Helper()
	id := s.bound(claim).Spec.CSI.VolumeHandle
	agent := csi.NewNodeClient(dialAgent(s.t))
	eventually(s.t, "health of the volume", func(ctx context.Context) error {
		resp, err := agent.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
		if err != nil {
			return err
		}
		return hasReason(resp.GetVolumeHealth().GetHealthStatuses(), reasonPoolFull)
	})
	eventually(s.t, "health of the storage", func(ctx context.Context) error {
		resp, err := agent.NodeGetStorageHealth(ctx, &csi.NodeGetStorageHealthRequest{})
		if err != nil {
			return err
		}
		return hasReason(resp.GetBackendHealth(), reasonPoolFull)
	})
	if os.Getenv("SHAPE") != "standard" {
		s.t.Log("NOT TESTED: only the standard shape has Events")
		return
	}
	eventually(s.t, "health of the volumes", func(ctx context.Context) error {
		resp, err := csi.NewControllerClient(dialController(s.t)).ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id})
		if err != nil {
			return err
		}
		return hasReason(resp.GetVolumeHealth().GetHealthStatuses(), reasonPoolFull)
	})
	s.described(claim, reasonPoolFull)
}

// toldWell checks that the user is told of the end of it.
func (s *space) toldWell(claim string) {
	s.t.Helper()
	if os.Getenv("SHAPE") == "standard" {
		s.described(claim, "VolumeHealthy")
	}
}

// reasonPoolFull is the reason of the health RPCs, and of Events.
const reasonPoolFull = "PoolFull"

// hasReason reports whether something is wrong for this reason.
func hasReason[E interface {
	GetReason() string
	GetMessage() string
}](entries []E, reason string) error {
	var seen []string
	for _, e := range entries {
		if e.GetReason() == reason {
			return nil
		}
		seen = append(seen, e.GetReason()+": "+e.GetMessage())
	}
	return fmt.Errorf("no %s among %q", reason, seen)
}

// described waits until kubectl describe shows a user this text of a claim.
func (s *space) described(claim, text string) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("%q in the description of %s", text, claim), func(ctx context.Context) error {
		out, err := exec.CommandContext(ctx, "kubectl", "-n", s.name, "describe", "persistentvolumeclaim", claim).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		if !strings.Contains(string(out), text) {
			return fmt.Errorf("it is %s", out)
		}
		return nil
	})
}

// TestOvercommit: volumes beyond what a pool may promise are refused, and the
// user reads why.
func TestOvercommit(t *testing.T) {
	agentArguments(t, "--overcommit=2")
	s := newSpace(t)
	s.claim("data", "300Mi", class(classSmall))
	s.claim("more", "200Mi", class(classSmall))
	s.start("pod", s.withClaim("data"))
	s.start("other", s.withClaim("more"))
	eventually(t, "capacity of the pool", func(ctx context.Context) error {
		c, err := capacityOf(ctx, classSmall)
		if err == nil && c.Capacity.Value() > 140<<20 {
			err = fmt.Errorf("capacity is %d", c.Capacity.Value())
		}
		return err
	})
	s.claim("late", "200Mi", class(classSmall), onNode) // past the scheduler
	s.described("late", "would promise more than 2 times")
	s.stop("other")
	s.deleteClaim("more")
	s.start("late", s.withClaim("late"))
}

// TestPoolPause: with --pool-pause a pod that fills the pool's disk waits
// instead of being told so, its user reads why, and when there is room again it
// goes on as if nothing had been.
func TestPoolPause(t *testing.T) {
	agentArguments(t, "--pool-pause=1h")
	s := newSpace(t)
	s.claim("data", "256Mi", class(classSmall))
	s.claim("more", "256Mi", class(classSmall))
	s.start("pod", s.withClaim("data"))
	s.start("other", s.withClaim("more"))
	s.write("other", mountPath+"/ballast", 150)
	written := make(chan error, 1)
	go func() { // ends when the pod has written, or with the deadline of try
		out, err := s.try("pod", "head -c 178257920 /dev/urandom | tee "+mountPath+"/noise | sha256sum >/tmp/sum && sync "+mountPath+"/noise")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		written <- err
	}()
	agent := csi.NewNodeClient(dialAgent(t))
	id := s.bound("data").Spec.CSI.VolumeHandle
	eventually(t, "health of the volume", func(ctx context.Context) error {
		resp, err := agent.NodeGetVolumeHealth(ctx, &csi.NodeGetVolumeHealthRequest{VolumeId: id})
		if err != nil {
			return err
		}
		return hasReason(resp.GetVolumeHealth().GetHealthStatuses(), "WritesPaused")
	})
	if os.Getenv("SHAPE") == "standard" {
		s.described("data", "WritesPaused")
	}
	s.stop("other")
	s.deleteClaim("more")
	if err := <-written; err != nil {
		t.Fatalf("the writer did not go on: %v", err)
	}
	s.want("content", s.sum("pod", mountPath+"/noise", 170), s.sh("pod", "cat /tmp/sum"))
}

// agentArguments adds arguments of the node agent until the test ends.
func agentArguments(t *testing.T, arguments ...string) {
	t.Helper()
	set, err := client.AppsV1().DaemonSets(driverNamespace).Get(t.Context(), "csi-qcow2-node", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	before := set.Spec.Template.Spec.Containers[0].Args
	change := func(arguments []string) {
		patch, err := json.Marshal([]map[string]any{{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": arguments}})
		if err != nil {
			t.Fatal(err)
		}
		patchAgents(t, types.JSONPatchType, string(patch))
		awaitAgent(t)
	}
	t.Cleanup(func() { change(before) })
	change(append(slices.Clone(before), arguments...))
}
