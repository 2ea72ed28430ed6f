package e2e

import (
	"context"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// elsewhere is a node that the cluster knows and that has no agent: it lacks
// the label of the operating system, by which agents choose.
const elsewhere = "elsewhere"

// TestRestoreElsewhere: a restore is made on the node of its source also if the
// scheduler has chosen another; where that is not allowed, its user reads why not.
func TestRestoreElsewhere(t *testing.T) {
	onlyStandard(t, "elsewhere each node makes its own volumes only")
	addNode(t)
	other := onlyElsewhere(t) // it outlives the claims
	s := newSpace(t)
	s.claim("source", "32Mi")
	s.start("writer", s.withClaim("source"))
	sum := s.write("writer", mountPath+"/noise", 2)
	s.snapshot("taken", "source")

	chosen := func(c *corev1.PersistentVolumeClaim) {
		c.Annotations = map[string]string{"volume.kubernetes.io/selected-node": elsewhere}
	}
	s.claim("restored", "32Mi", fromSnapshot("taken"), chosen)
	s.want("node of the restored volume", affinity(s.bound("restored")), nodeName())
	s.start("reader", s.withClaim("restored"))
	s.want("restored content", s.sum("reader", mountPath+"/noise", 2), sum)

	s.claim("far", "32Mi", fromSnapshot("taken"), chosen, class(other))
	s.described("far", "a restore or clone is made where its source is; the request allows "+elsewhere+" only")
	if phase := s.getClaim("far").Status.Phase; phase != corev1.ClaimPending {
		t.Fatalf("the claim is %s, want Pending", phase)
	}
	// A claim that waits holds its snapshot, so it goes first.
	s.deleteClaim("far")
}

// addNode makes the node elsewhere until the test ends.
func addNode(t *testing.T) {
	t.Helper()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: elsewhere, Labels: map[string]string{topologyKey: elsewhere}}}
	if _, err := client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.CoreV1().Nodes().Delete(context.Background(), elsewhere, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	drivers := &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: elsewhere}, Spec: storagev1.CSINodeSpec{
		Drivers: []storagev1.CSINodeDriver{{Name: driverName, NodeID: elsewhere, TopologyKeys: []string{topologyKey}}},
	}}
	if _, err := client.StorageV1().CSINodes().Create(t.Context(), drivers, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.StorageV1().CSINodes().Delete(context.Background(), elsewhere, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// onlyElsewhere makes a StorageClass for volumes of that node until the test ends.
func onlyElsewhere(t *testing.T) string {
	t.Helper()
	wait := storagev1.VolumeBindingWaitForFirstConsumer
	c, err := client.StorageV1().StorageClasses().Create(t.Context(), &storagev1.StorageClass{
		ObjectMeta:        metav1.ObjectMeta{GenerateName: elsewhere + "-"},
		Provisioner:       driverName,
		VolumeBindingMode: &wait,
		AllowedTopologies: []corev1.TopologySelectorTerm{{
			MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{Key: topologyKey, Values: []string{elsewhere}}},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.StorageV1().StorageClasses().Delete(context.Background(), c.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return c.Name
}
