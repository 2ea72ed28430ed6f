package lead

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/klog/v2"
)

// MetadataServices is the resource by which backup programs find the snapshot
// metadata of a driver, and learn which CA to trust.
var MetadataServices = schema.GroupVersionResource{Group: "cbt.storage.k8s.io", Version: "v1beta1", Resource: "snapshotmetadataservices"}

// PublishMetadataCA returns a Certificates.Publish that writes the bundle into
// the SnapshotMetadataService name.
func PublishMetadataCA(client dynamic.Interface, name string) func(context.Context, []byte) error {
	return func(ctx context.Context, bundle []byte) error {
		service, err := client.Resource(MetadataServices).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("SnapshotMetadataService %s: %w", name, err)
		}
		text, _, err := unstructured.NestedString(service.Object, "spec", "caCert")
		if err != nil {
			return fmt.Errorf("SnapshotMetadataService %s: %w", name, err)
		}
		if had, err := base64.StdEncoding.DecodeString(text); err == nil && bytes.Equal(had, bundle) {
			return nil
		}
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": service.GetResourceVersion()}, // unless another was first
			"spec":     map[string]any{"caCert": bundle},
		})
		if err != nil {
			return err
		}
		if _, err := client.Resource(MetadataServices).Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("SnapshotMetadataService %s: %w", name, err)
		}
		klog.FromContext(ctx).V(2).Info("CA published", "snapshotMetadataService", name)
		return nil
	}
}
