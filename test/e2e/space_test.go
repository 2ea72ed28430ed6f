package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A space is the namespace of one test.
type space struct {
	t    *testing.T
	name string
}

// newSpace makes a namespace that ends with the test.
func newSpace(t *testing.T) *space {
	t.Helper()
	ns, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s := &space{t, ns.Name}
	t.Cleanup(s.close)
	eventually(t, "default service account", func(ctx context.Context) error {
		_, err := client.CoreV1().ServiceAccounts(s.name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return s
}

// close deletes the namespace and waits until nothing of it is left.
func (s *space) close() {
	if s.t.Failed() {
		s.report()
	}
	if err := client.CoreV1().Namespaces().Delete(context.Background(), s.name, metav1.DeleteOptions{}); err != nil {
		s.t.Error(err)
	}
	eventually(s.t, "end of "+s.name, func(ctx context.Context) error {
		if _, err := client.CoreV1().Namespaces().Get(ctx, s.name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return errors.Join(fmt.Errorf("namespace %s is still there", s.name), err)
		}
		volumes, err := client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, v := range volumes.Items {
			if v.Spec.ClaimRef != nil && v.Spec.ClaimRef.Namespace == s.name {
				return fmt.Errorf("volume %s of %s is %s", v.Name, v.Spec.ClaimRef.Name, v.Status.Phase)
			}
		}
		contents, err := snapshots.SnapshotV1().VolumeSnapshotContents().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, c := range contents.Items {
			if c.Spec.VolumeSnapshotRef.Namespace == s.name {
				return fmt.Errorf("content %s of snapshot %s is still there", c.Name, c.Spec.VolumeSnapshotRef.Name)
			}
		}
		return nil
	})
}

// report logs what a reader of a failure wants to know.
func (s *space) report() {
	ctx := context.Background()
	if events, err := client.CoreV1().Events(s.name).List(ctx, metav1.ListOptions{}); err == nil {
		for _, e := range events.Items {
			s.t.Logf("event %s/%s %s: %s", e.InvolvedObject.Kind, e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	if claims, err := client.CoreV1().PersistentVolumeClaims(s.name).List(ctx, metav1.ListOptions{}); err == nil {
		for _, c := range claims.Items {
			s.t.Logf("claim %s: %s %s", c.Name, c.Status.Phase, c.Spec.VolumeName)
		}
	}
}

// A claimOption changes a claim before it is made.
type claimOption func(*corev1.PersistentVolumeClaim)

func class(name string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) { c.Spec.StorageClassName = &name }
}

func block(c *corev1.PersistentVolumeClaim) {
	mode := corev1.PersistentVolumeBlock
	c.Spec.VolumeMode = &mode
}

func access(mode corev1.PersistentVolumeAccessMode) claimOption {
	return func(c *corev1.PersistentVolumeClaim) { c.Spec.AccessModes = []corev1.PersistentVolumeAccessMode{mode} }
}

func fromSnapshot(name string) claimOption {
	group := snapshotv1.GroupName
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: name}
	}
}

func fromClaim(name string) claimOption {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: name}
	}
}

// onNode provisions a claim at once, without a pod, as the scheduler would have decided.
func onNode(c *corev1.PersistentVolumeClaim) {
	c.Annotations = map[string]string{"volume.kubernetes.io/selected-node": nodeName()}
}

// claim makes a PersistentVolumeClaim.
func (s *space) claim(name, size string, options ...claimOption) {
	s.t.Helper()
	standard := classDefault
	c := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &standard,
			AccessModes:      []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)},
			},
		},
	}
	for _, o := range options {
		o(c)
	}
	if _, err := client.CoreV1().PersistentVolumeClaims(s.name).Create(s.t.Context(), c, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// getClaim returns a claim as it is now.
func (s *space) getClaim(name string) *corev1.PersistentVolumeClaim {
	s.t.Helper()
	c, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// bound waits until the claim has a volume and returns it.
func (s *space) bound(name string) *corev1.PersistentVolume {
	s.t.Helper()
	eventually(s.t, "claim "+name, func(ctx context.Context) error {
		c, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(ctx, name, metav1.GetOptions{})
		if err == nil && c.Status.Phase != corev1.ClaimBound {
			err = fmt.Errorf("claim is %s", c.Status.Phase)
		}
		return err
	})
	v, err := client.CoreV1().PersistentVolumes().Get(s.t.Context(), s.getClaim(name).Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// deleteClaim deletes a claim and waits until it is gone.
func (s *space) deleteClaim(name string) {
	s.t.Helper()
	if err := client.CoreV1().PersistentVolumeClaims(s.name).Delete(s.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "end of claim "+name, func(ctx context.Context) error {
		_, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(ctx, name, metav1.GetOptions{})
		return wantGone(err)
	})
}

// wantGone turns the error of a Get into that of waiting for an end.
func wantGone(err error) error {
	switch {
	case err == nil:
		return errors.New("it is still there")
	case apierrors.IsNotFound(err):
		return nil
	}
	return err
}

// snapshot takes a snapshot of a claim and waits until it is ready.
func (s *space) snapshot(name, claim string) *snapshotv1.VolumeSnapshot {
	s.t.Helper()
	class := classDefault
	_, err := snapshots.SnapshotV1().VolumeSnapshots(s.name).Create(s.t.Context(), &snapshotv1.VolumeSnapshot{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: snapshotv1.VolumeSnapshotSpec{
			VolumeSnapshotClassName: &class,
			Source:                  snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	var taken *snapshotv1.VolumeSnapshot
	eventually(s.t, "snapshot "+name, func(ctx context.Context) (err error) {
		taken, err = snapshots.SnapshotV1().VolumeSnapshots(s.name).Get(ctx, name, metav1.GetOptions{})
		if err == nil && (taken.Status == nil || taken.Status.ReadyToUse == nil || !*taken.Status.ReadyToUse) {
			err = fmt.Errorf("snapshot is not ready: %+v", taken.Status)
		}
		return err
	})
	return taken
}

// deleteSnapshot deletes a snapshot and waits until it is gone.
func (s *space) deleteSnapshot(name string) {
	s.t.Helper()
	if err := snapshots.SnapshotV1().VolumeSnapshots(s.name).Delete(s.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "end of snapshot "+name, func(ctx context.Context) error {
		_, err := snapshots.SnapshotV1().VolumeSnapshots(s.name).Get(ctx, name, metav1.GetOptions{})
		return wantGone(err)
	})
}

// event waits for an event on an object with this text in its reason or message.
func (s *space) event(kind, name, text string) {
	s.t.Helper()
	eventually(s.t, fmt.Sprintf("event %q on %s %s", text, kind, name), func(ctx context.Context) error {
		events, err := client.CoreV1().Events(s.name).List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range events.Items {
			if e.InvolvedObject.Kind != kind || e.InvolvedObject.Name != name {
				continue
			}
			line := e.Reason + ": " + e.Message
			if containsFold(line, text) {
				return nil
			}
			seen = append(seen, line)
		}
		return fmt.Errorf("seen only %q", seen)
	})
}
