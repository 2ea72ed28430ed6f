package check

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	groupv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// scheme has the kinds that may stand in the manifests.
var scheme = func() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		appsv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme, rbacv1.AddToScheme, storagev1.AddToScheme,
		policyv1.AddToScheme, snapshotv1.AddToScheme, groupv1.AddToScheme,
	} {
		utilruntime.Must(add(s))
	}
	return s
}()

// decode reads one object of YAML and refuses unknown kinds and fields, and
// fields that stand twice.
func decode(yaml []byte) (runtime.Object, error) {
	codec := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true})
	object, _, err := codec.Decode(yaml, nil, nil)
	return object, err
}

// render builds a kustomization of fs and decodes its objects.
func render(t *testing.T, fs filesys.FileSystem, dir string) []runtime.Object {
	t.Helper()
	resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(fs, dir)
	if err != nil {
		t.Fatalf("kustomize build %s: %v", dir, err)
	}
	var objects []runtime.Object
	for _, resource := range resources.Resources() {
		yaml, err := resource.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		object, err := decode(yaml)
		if err != nil {
			t.Errorf("%s of %s: %v", resource.CurId(), dir, err)
			continue
		}
		objects = append(objects, object)
	}
	if len(objects) == 0 {
		t.Fatalf("%s renders to nothing", dir)
	}
	return objects
}

// manifests renders one of the directories beside this one.
func manifests(t *testing.T, dir string) []runtime.Object {
	t.Helper()
	return render(t, filesys.MakeFsOnDisk(), filepath.Join("..", dir))
}

// only returns the one object of type T.
func only[T runtime.Object](objects []runtime.Object) (T, error) {
	found := all[T](objects)
	var zero T
	if len(found) != 1 {
		return zero, fmt.Errorf("there are %d objects of type %T, want 1", len(found), zero)
	}
	return found[0], nil
}

// all returns the objects of type T.
func all[T runtime.Object](objects []runtime.Object) []T {
	var found []T
	for _, object := range objects {
		if o, ok := object.(T); ok {
			found = append(found, o)
		}
	}
	return found
}

func TestDecodeIsStrict(t *testing.T) {
	for name, yaml := range map[string]string{
		"unknown kind":  "apiVersion: apps/v1\nkind: DemonSet\nmetadata: {name: x}",
		"unknown field": "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: x}\nspec: {attachRequried: false}",
		"field twice":   "apiVersion: v1\nkind: Namespace\nmetadata: {name: x, name: y}",
		"wrong type":    "apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: x}\nspec: {attachRequired: 3}",
	} {
		if _, err := decode([]byte(yaml)); err == nil {
			t.Errorf("%s: it decodes", name)
		}
	}
}

// TestExamples: every claim is of our class, every pod uses a claim that is
// there, and every data source is there too.
func TestExamples(t *testing.T) {
	objects := manifests(t, "examples")
	class, err := only[*storagev1.StorageClass](manifests(t, "overlays/small"))
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]bool{}
	for _, o := range objects {
		switch o := o.(type) {
		case *corev1.PersistentVolumeClaim:
			known["PersistentVolumeClaim/"+o.Name] = true
		case *snapshotv1.VolumeSnapshot:
			known["VolumeSnapshot/"+o.Name] = true
		}
	}
	for _, claim := range all[*corev1.PersistentVolumeClaim](objects) {
		if claim.Spec.StorageClassName == nil || *claim.Spec.StorageClassName != class.Name {
			t.Errorf("claim %s is not of class %s", claim.Name, class.Name)
		}
		if from := claim.Spec.DataSource; from != nil && !known[from.Kind+"/"+from.Name] {
			t.Errorf("claim %s comes from %s %s, which is not there", claim.Name, from.Kind, from.Name)
		}
	}
	for _, snapshot := range all[*snapshotv1.VolumeSnapshot](objects) {
		if of := snapshot.Spec.Source.PersistentVolumeClaimName; of == nil || !known["PersistentVolumeClaim/"+*of] {
			t.Errorf("snapshot %s is of a claim that is not there", snapshot.Name)
		}
	}
	pods := all[*corev1.Pod](objects)
	if len(pods) < 4 {
		t.Errorf("%d pods, want 4 or more", len(pods))
	}
	for _, pod := range pods {
		for _, v := range pod.Spec.Volumes {
			if !known["PersistentVolumeClaim/"+v.PersistentVolumeClaim.ClaimName] {
				t.Errorf("pod %s uses claim %s, which is not there", pod.Name, v.PersistentVolumeClaim.ClaimName)
			}
		}
	}
}

// TestOperatorNamesImages does what README.md tells an operator: a
// kustomization of his own that says where the images are.
func TestOperatorNamesImages(t *testing.T) {
	fs := filesys.MakeFsInMemory()
	disk := filesys.MakeFsOnDisk()
	for _, dir := range []string{"base", "overlays/small", "overlays/single-node", "overlays/standard"} {
		files, err := filepath.Glob(filepath.Join("..", dir, "*.yaml"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", dir, len(files), err)
		}
		for _, file := range files {
			text, err := disk.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := fs.WriteFile(filepath.Join("/", dir, filepath.Base(file)), text); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, overlay := range []string{"single-node", "standard"} {
		own := "resources: [../overlays/" + overlay + "]\nimages:\n"
		for _, name := range []string{"csi-qcow2", "csi-provisioner", "csi-snapshotter", "csi-resizer", "csi-node-driver-registrar", "livenessprobe"} {
			own += fmt.Sprintf("  - {name: %s, newName: images.example/storage/%s}\n", name, name)
		}
		if err := fs.WriteFile("/own/kustomization.yaml", []byte(own)); err != nil {
			t.Fatal(err)
		}
		for _, object := range render(t, fs, "/own") {
			var pod corev1.PodSpec
			switch o := object.(type) {
			case *appsv1.DaemonSet:
				pod = o.Spec.Template.Spec
			case *appsv1.Deployment:
				pod = o.Spec.Template.Spec
			}
			for _, c := range pod.Containers {
				if !strings.HasPrefix(c.Image, "images.example/storage/") {
					t.Errorf("%s: container %s has image %s", overlay, c.Name, c.Image)
				}
			}
		}
	}
}
