package e2e

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"golang.org/x/sys/unix"
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
}
