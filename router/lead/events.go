package lead

import (
	"context"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
)

// Events tells users what is wrong with their volumes, as Events of their
// PersistentVolumeClaims: when something goes wrong, and when all is well again.
type Events struct {
	Recorder record.EventRecorder
	// Volumes are the PersistentVolumes, with the index ByHandle.
	Volumes cache.Indexer
	// Unhealthy returns the volumes that something is wrong with. Of volumes for which
	// asked is false nothing is known; with an error there may be some.
	Unhealthy func(context.Context) (sick []*csi.VolumeHealth, asked func(id string) bool, err error)

	told map[string]string // what was last told of a volume, by ID
}

// ByHandle is an index of PersistentVolumes by the volume handles of driver.
const ByHandle = "csi volume handle"

// Indexers returns the index ByHandle of a driver's PersistentVolumes.
func Indexers(driver string) cache.Indexers {
	return cache.Indexers{ByHandle: func(object any) ([]string, error) {
		pv, ok := object.(*corev1.PersistentVolume)
		if !ok || pv.Spec.CSI == nil || pv.Spec.CSI.Driver != driver {
			return nil, nil
		}
		return []string{pv.Spec.CSI.VolumeHandle}, nil
	}}
}

// reasonHealthy is the reason of the Event that ends a problem.
const reasonHealthy = "VolumeHealthy"

// Tell looks at all volumes once. A volume whose node does not answer keeps
// what was told of it.
func (e *Events) Tell(ctx context.Context) error {
	all, asked, err := e.Unhealthy(ctx)
	if e.told == nil {
		e.told = make(map[string]string)
	}
	sick := make(map[string]bool, len(all))
	for _, health := range all {
		id := health.GetVolumeId()
		sick[id] = true
		problems := summary(health)
		if e.told[id] == problems {
			continue
		}
		if e.event(id, corev1.EventTypeWarning, health.GetHealthStatuses()[0].GetReason(), problems) {
			e.told[id] = problems
		}
	}
	for id := range e.told {
		switch {
		case sick[id]:
		case asked != nil && asked(id):
			e.event(id, corev1.EventTypeNormal, reasonHealthy, "the volume is well again")
			delete(e.told, id)
		case len(e.volumes(id)) == 0:
			delete(e.told, id) // there is nobody to be told any more
		}
	}
	return err
}

// volumes returns the PersistentVolumes of a volume.
func (e *Events) volumes(id string) []any {
	objects, err := e.Volumes.ByIndex(ByHandle, id)
	if err != nil {
		return nil // without its index there are no PersistentVolumes at all
	}
	return objects
}

// summary says what is wrong with a volume, always in the same words.
func summary(health *csi.VolumeHealth) string {
	var problems []string
	for _, s := range health.GetHealthStatuses() {
		problems = append(problems, s.GetReason()+": "+s.GetMessage())
	}
	slices.Sort(problems)
	return strings.Join(problems, "; ")
}

// event records an Event of the claim of a volume, and of its PersistentVolume.
// It reports whether there is one.
func (e *Events) event(id, kind, reason, message string) bool {
	objects := e.volumes(id)
	for _, object := range objects {
		pv := object.(*corev1.PersistentVolume)
		var about runtime.Object = pv
		if claim := pv.Spec.ClaimRef; claim != nil {
			about = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}
		}
		e.Recorder.Event(about, kind, reason, message)
	}
	return len(objects) > 0
}
