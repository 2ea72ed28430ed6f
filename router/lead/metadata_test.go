package lead

import (
	"encoding/base64"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic/fake"
)

func TestPublishMetadataCA(t *testing.T) {
	service := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": MetadataServices.GroupVersion().String(), "kind": "SnapshotMetadataService",
		"metadata": map[string]any{"name": "csi-qcow2.dev"},
		"spec":     map[string]any{"address": "x:1", "audience": "a", "caCert": "AA=="},
	}}
	client := fake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(),
		map[schema.GroupVersionResource]string{MetadataServices: "SnapshotMetadataServiceList"}, service)
	publish := PublishMetadataCA(client, "csi-qcow2.dev")
	for _, bundle := range []string{"one", "one", "two"} {
		if err := publish(t.Context(), []byte(bundle)); err != nil {
			t.Fatal(err)
		}
		got, err := client.Resource(MetadataServices).Get(t.Context(), "csi-qcow2.dev", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		spec := got.Object["spec"].(map[string]any)
		if spec["caCert"] != base64.StdEncoding.EncodeToString([]byte(bundle)) || spec["address"] != "x:1" {
			t.Errorf("the spec is %v, want the CA %q", spec, bundle)
		}
	}
	patches := 0
	for _, action := range client.Actions() {
		if action.GetVerb() == "patch" {
			patches++
		}
	}
	if patches != 2 {
		t.Errorf("%d patches for two bundles", patches)
	}
	if err := PublishMetadataCA(client, "missing")(t.Context(), nil); err == nil {
		t.Error("there is no such service, and it is published")
	}
}
