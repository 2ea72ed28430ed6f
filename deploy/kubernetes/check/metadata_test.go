package check

import (
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// A SnapshotMetadataService is cbt.storage.k8s.io/v1beta1's, whose module is
// not published.
type SnapshotMetadataService struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Address  string `json:"address"`
		Audience string `json:"audience"`
		CACert   []byte `json:"caCert"`
	} `json:"spec"`
}

// DeepCopyObject implements runtime.Object.
func (s *SnapshotMetadataService) DeepCopyObject() runtime.Object {
	c := *s
	return &c
}

func init() {
	scheme.AddKnownTypes(schema.GroupVersion{Group: "cbt.storage.k8s.io", Version: "v1beta1"}, &SnapshotMetadataService{})
}

// TestSnapshotMetadataComponent: the sidecar serves where the service points,
// with the certificate that the controller keeps.
func TestSnapshotMetadataComponent(t *testing.T) {
	dir := ownKustomization(t, "resources: [../overlays/standard]\ncomponents: [../components/snapshot-metadata]\n")
	objects := render(t, filesys.MakeFsOnDisk(), dir)
	service, err1 := only[*corev1.Service](objects)
	found, err2 := only[*SnapshotMetadataService](objects)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	var pod corev1.PodTemplateSpec
	for _, p := range podsOf(objects) {
		if p.Labels["app.kubernetes.io/component"] == "controller" {
			pod = p
		}
	}
	driver, sidecar := &pod.Spec.Containers[0], (*corev1.Container)(nil)
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == "csi-snapshot-metadata" {
			sidecar = &pod.Spec.Containers[i]
		}
	}
	if driver.Name != "driver" || sidecar == nil {
		t.Fatalf("the first container is %s, the sidecar %v", driver.Name, sidecar)
	}
	secret := flag(driver, "snapshot-metadata-secret")
	mount := slices.IndexFunc(sidecar.VolumeMounts, func(m corev1.VolumeMount) bool {
		return strings.HasPrefix(flag(sidecar, "tls-cert"), m.MountPath+"/") && m.SubPath == ""
	})
	volume := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		return mount >= 0 && v.Name == sidecar.VolumeMounts[mount].Name && v.Secret != nil && v.Secret.SecretName == secret
	})
	role := slices.ContainsFunc(all[*rbacv1.Role](objects), func(r *rbacv1.Role) bool {
		return slices.ContainsFunc(r.Rules, func(p rbacv1.PolicyRule) bool {
			return slices.Equal(p.ResourceNames, []string{secret}) && slices.Equal(p.Verbs, []string{"get", "update"})
		})
	})
	there := slices.ContainsFunc(all[*corev1.Secret](objects), func(s *corev1.Secret) bool { return s.Name == secret && len(s.Data) == 0 })
	host := service.Name + "." + service.Namespace
	for _, err := range []error{
		hold(volume >= 0, "the sidecar does not mount Secret %s where it looks", secret),
		hold(role && there, "Secret %s: rights %v, there and empty %v", secret, role, there),
		hold(flag(driver, "snapshot-metadata-host") == host, "the certificate is of %q", flag(driver, "snapshot-metadata-host")),
		hold(found.Spec.Address == host+":6443" && service.Spec.Ports[0].Port == 6443, "clients call %q", found.Spec.Address),
		hold(service.Spec.Ports[0].TargetPort.IntValue() == int(sidecar.Ports[0].ContainerPort), "the service's port leads nowhere"),
		hold(maps.Equal(service.Spec.Selector, map[string]string{"app.kubernetes.io/name": "csi-qcow2", "app.kubernetes.io/component": "controller"}), "the service selects %v", service.Spec.Selector),
		hold(found.Name == newStandard(t).driver.Name && found.Spec.Audience != "" && len(found.Spec.CACert) > 0, "the SnapshotMetadataService is %+v", found),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	for _, c := range pod.Spec.Containers {
		if x := c.SecurityContext; x == nil || x.AllowPrivilegeEscalation == nil || *x.AllowPrivilegeEscalation {
			t.Errorf("%s is not confined", c.Name)
		}
	}
}
