package lead

import (
	"context"
	"errors"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

func TestEvents(t *testing.T) {
	const driver = "csi-qcow2.dev"
	index := cache.NewIndexer(cache.MetaNamespaceKeyFunc, Indexers(driver))
	add := func(name, driver, handle string, claim *corev1.ObjectReference) {
		index.Add(&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
			ClaimRef:               claim,
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle}},
		}})
	}
	add("a", driver, "vol-a", &corev1.ObjectReference{Namespace: "ns", Name: "claim-a", UID: "1"})
	add("b", driver, "vol-b", nil)
	add("other", "other.dev", "vol-c", &corev1.ObjectReference{Namespace: "ns", Name: "claim-c"})
	recorder := record.NewFakeRecorder(100)
	recorder.IncludeObject = true
	var sick []*csi.VolumeHealth
	var unknown error
	silent := make(map[string]bool) // volumes of nodes that do not answer
	events := &Events{Recorder: recorder, Volumes: index, Unhealthy: func(context.Context) ([]*csi.VolumeHealth, func(string) bool, error) {
		return sick, func(id string) bool { return !silent[id] }, unknown
	}}
	health := func(id string, reasons ...string) *csi.VolumeHealth {
		h := &csi.VolumeHealth{VolumeId: id}
		for _, r := range reasons {
			h.HealthStatuses = append(h.HealthStatuses, &csi.VolumeHealth_VolumeHealthEntry{Reason: r, Message: "m"})
		}
		return h
	}
	tell := func(wantErr bool, want ...string) {
		t.Helper()
		for range 2 { // the second time there is nothing new
			if err := events.Tell(t.Context()); (err != nil) != wantErr {
				t.Errorf("tell: %v", err)
			}
		}
		got := make(map[string]bool)
		for len(recorder.Events) > 0 {
			e := <-recorder.Events
			if got[e] {
				t.Errorf("twice: %s", e)
			}
			got[e] = true
		}
		for _, w := range want {
			if !got[w] {
				t.Errorf("there is no event %q, there are %v", w, got)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d events, want %d: %v", len(got), len(want), got)
		}
	}
	const claimA, volumeB = " involvedObject{kind=PersistentVolumeClaim,apiVersion=v1}", " involvedObject{kind=,apiVersion=}"
	tell(false)
	sick = []*csi.VolumeHealth{health("vol-a", "PoolFull", "DeviceLost"), health("vol-b", "PoolFull"), health("vol-c", "x"), health("vol-gone", "x")}
	tell(false, "Warning PoolFull DeviceLost: m; PoolFull: m"+claimA, "Warning PoolFull PoolFull: m"+volumeB)
	sick = []*csi.VolumeHealth{health("vol-a", "DeviceLost", "PoolFull"), health("vol-b", "ImageCorrupt")}
	tell(false, "Warning ImageCorrupt ImageCorrupt: m"+volumeB) // of a, only the order is another
	sick, unknown = nil, errors.New("a node does not answer")
	silent["vol-a"], silent["vol-b"] = true, true
	tell(true)
	silent["vol-b"] = false // it is on another node, of which nothing needs to be waited for
	tell(true, "Normal VolumeHealthy the volume is well again"+volumeB)
	sick = []*csi.VolumeHealth{health("vol-b", "ImageCorrupt")}
	tell(true, "Warning ImageCorrupt ImageCorrupt: m"+volumeB) // it is not the one from before
	sick, unknown = nil, nil                                   // the node of a has left the cluster: nobody says that a is well
	tell(false, "Normal VolumeHealthy the volume is well again"+volumeB)
	silent["vol-a"] = false
	tell(false, "Normal VolumeHealthy the volume is well again"+claimA)
}
