package check

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// TestMetricsComponent adds the component to each overlay, as an operator
// would: the driver serves metrics, and the port is open; without, it is not.
func TestMetricsComponent(t *testing.T) {
	for _, overlay := range overlays {
		dir := ownKustomization(t, "resources: [../"+overlay+"]\ncomponents: [../components/metrics]\n")
		with := render(t, filesys.MakeFsOnDisk(), dir)
		served := 0
		for _, pod := range podsOf(with) {
			agent := pod.Spec.Containers[0]
			if agent.Name == "holder" {
				continue // it has nothing to measure
			}
			port := slices.IndexFunc(agent.Ports, func(p corev1.ContainerPort) bool { return p.Name == "metrics" })
			if agent.Name != "driver" || flag(&agent, "metrics-address") != ":9811" || port < 0 || agent.Ports[port].ContainerPort != 9811 ||
				pod.Annotations["prometheus.io/port"] != "9811" || pod.Annotations["prometheus.io/scrape"] != "true" {
				t.Errorf("%s: %s has arguments %q and ports %v", overlay, agent.Name, agent.Args, agent.Ports)
			}
			served++
		}
		open := slices.ContainsFunc(all[*networkingv1.NetworkPolicy](with), func(p *networkingv1.NetworkPolicy) bool {
			return len(p.Spec.Ingress) == 1 && len(p.Spec.Ingress[0].From) == 0 && p.Spec.Ingress[0].Ports[0].Port.IntValue() == 9811
		})
		if !open || served == 0 {
			t.Errorf("%s: open %v, %d pods", overlay, open, served)
		}
		for _, pod := range podsOf(manifests(t, overlay)) {
			if flag(&pod.Spec.Containers[0], "metrics-address") != "" {
				t.Errorf("%s serves metrics without the component", overlay)
			}
		}
	}
}

// podsOf returns the pods of the objects that make some.
func podsOf(objects []runtime.Object) []corev1.PodTemplateSpec {
	var pods []corev1.PodTemplateSpec
	for _, object := range objects {
		switch o := object.(type) {
		case *appsv1.DaemonSet:
			pods = append(pods, o.Spec.Template)
		case *appsv1.Deployment:
			pods = append(pods, o.Spec.Template)
		}
	}
	return pods
}

// ownKustomization writes a kustomization of an operator's own beside the
// overlays, as far as kustomize can tell, and returns its directory.
func ownKustomization(t *testing.T, text string) string {
	t.Helper()
	root := t.TempDir()
	above, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(root, os.DirFS(above)); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "own")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}
