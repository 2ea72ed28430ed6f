package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/durable"
	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// A stageHint is what the run directory remembers of a staged volume. It is
// written before each step that it describes, so that it never knows less than
// the kernel does; what it says too much is found by looking.
type stageHint struct {
	Volume      string            `json:"volume"`
	BootID      string            `json:"bootID"`     // the boot that it was written in
	Generation  int64             `json:"generation"` // of the attach: rises with each, also across restarts
	Device      string            `json:"device,omitempty"`
	Cache       string            `json:"cache"`          // Options.CacheID of what was written and not flushed
	Lost        bool              `json:"lost,omitempty"` // something that was written is lost: only a new stage helps
	StagingPath string            `json:"stagingPath"`
	Block       bool              `json:"block,omitempty"`
	Mode        string            `json:"mode"`             // access mode
	FSType      string            `json:"fsType,omitempty"` // as asked for; "" leaves it to the driver
	Flags       []string          `json:"flags,omitempty"`
	Targets     map[string]target `json:"targets,omitempty"` // by target path
}

// A target is one publish of a staged volume.
type target struct {
	ReadOnly bool   `json:"readOnly,omitempty"`
	Mode     string `json:"mode"`
}

const (
	hintKind    = "csi-qcow2 staged volume"
	hintVersion = 1
	hintsDir    = "staged"
)

func (h *stageHint) origin() (volume, bootID string) { return h.Volume, h.BootID }

// deviceID names the device of this attach: unique on the node, and found
// again by nbdexport.Attacher.Stale.
func (h *stageHint) deviceID() string { return fmt.Sprintf("%s.%d", h.Volume, h.Generation) }

// readOnly reports whether nobody may write to the volume.
func (h *stageHint) readOnly() bool {
	return h.Mode == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY.String()
}

// mountsReadOnly reports whether the filesystem is mounted read-only: it cannot grow then.
func (h *stageHint) mountsReadOnly() bool {
	readOnly := h.readOnly()
	for _, flag := range h.Flags { // the last counts
		readOnly = flag == "ro" || readOnly && flag != "rw"
	}
	return readOnly
}

// same reports whether h and o were asked for in the same way.
func (h *stageHint) same(o *stageHint) bool {
	return h.StagingPath == o.StagingPath && h.Block == o.Block && h.Mode == o.Mode &&
		h.FSType == o.FSType && slices.Equal(h.Flags, o.Flags)
}

// A stagedVolume is a volume that is staged, or that a predecessor staged and
// this process has not repaired. It is replaced, never changed, except under
// the lock of its volume ID by the one who holds it.
type stagedVolume struct {
	hint   stageHint
	disk   *volume.Disk     // nil when lost
	device nbdexport.Device // nil when lost
	pause  *pausing         // nil when lost, and when its writes never wait for space
	loss   error            // why device is nil
}

// lossOf returns why requests to v fail or wait, or nil while they are served.
func (d *Driver) lossOf(v *stagedVolume) error {
	if v.device == nil {
		return v.loss
	}
	return v.device.Health()
}

// stagedVolume returns the staged volume id, or nil.
func (d *Driver) stagedVolume(id string) *stagedVolume {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.staged[id]
}

func hintName(id string) string { return hintsDir + "/" + id + ".json" }

// remember makes v the staged volume of its ID, on disk first.
func (d *Driver) remember(v *stagedVolume) error {
	if err := durable.WriteRecord(d.runDir, hintName(v.hint.Volume), hintKind, hintVersion, v.hint); err != nil {
		return err
	}
	d.put(v)
	return nil
}

// put makes v the staged volume of its ID in this process.
func (d *Driver) put(v *stagedVolume) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.staged[v.hint.Volume] = v
}

// drop takes the volume id away in this process.
func (d *Driver) drop(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.staged, id)
}

// forget removes what is remembered of the volume id.
func (d *Driver) forget(id string) error {
	if err := d.runDir.Remove(hintName(id)); err != nil {
		return err
	}
	d.drop(id)
	d.meters.Delete(id)
	d.usages.Delete(id)
	return nil
}

// withTargets returns a copy of v whose targets can be changed.
func (v *stagedVolume) withTargets() *stagedVolume {
	next := *v
	next.hint.Targets = make(map[string]target, len(v.hint.Targets)+1)
	for path, t := range v.hint.Targets {
		next.hint.Targets[path] = t
	}
	return &next
}

// staleTimeout bounds how long one device of an ended process is waited for:
// a pod may hold it for as long as it likes.
const staleTimeout = 2 * time.Second

// cleanStale removes devices of ended processes whose ID is wanted, as far as
// nothing holds them. Those that are held stay for the next call.
func (d *Driver) cleanStale(ctx context.Context, wanted func(deviceID string) bool) error {
	stale, err := d.opts.Attacher.Stale(ctx)
	if err != nil {
		klog.FromContext(ctx).Error(err, "looking for devices of ended processes")
	}
	for _, dev := range stale {
		if !wanted(dev.ID) {
			continue
		}
		switch err := clean(ctx, dev); {
		case err == nil:
			klog.FromContext(ctx).Info("removed a device of an ended process", "deviceID", dev.ID, "device", dev.Path)
		case errors.Is(err, nbdexport.ErrDeviceBusy):
			klog.FromContext(ctx).Info("a device of an ended process is still in use", "deviceID", dev.ID, "device", dev.Path)
		default:
			klog.FromContext(ctx).Error(err, "removing a device of an ended process", "deviceID", dev.ID, "device", dev.Path)
		}
	}
	return ctx.Err()
}

func clean(ctx context.Context, dev nbdexport.StaleDevice) error {
	ctx, cancel := context.WithTimeout(ctx, staleTimeout)
	defer cancel()
	return dev.Clean(ctx)
}

// cleanStaleOf is cleanStale for the devices of the volume id.
func (d *Driver) cleanStaleOf(ctx context.Context, id string) error {
	return d.cleanStale(ctx, func(deviceID string) bool { return strings.HasPrefix(deviceID, id+".") })
}

// bootID identifies the run of the kernel.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
