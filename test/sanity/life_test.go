package sanity

import (
	"bytes"
	"os/exec"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"csi-qcow2/driver"
)

// TestLife plays the life of volumes with a pod that writes.
func TestLife(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			p, k := startNode(t)
			content := bytes.Repeat([]byte(fstype), 1<<20)
			source := k.useNew("source", fstype)
			writeFile(t, k.target("source")+"/f", content)
			snap := k.snapshot("snap", source)
			writeFile(t, k.target("source")+"/f", []byte("changed"))
			restored := k.create("restored", 1024, fromSnapshot(snap), fstype)
			cloned := k.create("cloned", 512, fromVolume(source), fstype)
			k.use("restored", restored, fstype) // mounted beside its source
			k.use("cloned", cloned, fstype)
			wantFile(t, k.target("restored")+"/f", content)
			wantFile(t, k.target("cloned")+"/f", []byte("changed"))
			if got := sizeOf(t, k.target("restored")); got < 900<<20 {
				t.Errorf("restored into 1 GiB: the filesystem has %d bytes", got)
			}
			if _, err := k.ControllerExpandVolume(k.rpc(), &csi.ControllerExpandVolumeRequest{VolumeId: source, CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}}); err != nil {
				t.Fatal(err)
			}
			if fstype == "ext4" && !driver.NewHost().GrowsMounted(fstype) {
				k.unuse("source", source) // no capability to grow it mounted: it grows at the next stage
				k.use("source", source, fstype)
			}
			if _, err := k.NodeExpandVolume(k.rpc(), &csi.NodeExpandVolumeRequest{VolumeId: source, VolumePath: k.target("source"), CapacityRange: &csi.CapacityRange{RequiredBytes: 2 << 30}}); err != nil {
				t.Fatal(err)
			}
			if got := sizeOf(t, k.target("source")); got < 1800<<20 {
				t.Errorf("expanded to 2 GiB: the filesystem has %d bytes", got)
			}
			if out, err := exec.Command("qemu-img", "check", volumes(t, p)[0]+"/disk.qcow2").CombinedOutput(); err == nil {
				t.Errorf("qemu-img check of an attached volume is not refused:\n%s", out)
			}
			for name, id := range map[string]string{"source": source, "restored": restored, "cloned": cloned} {
				k.dispose(name, id)
			}
			k.deleteSnapshot(snap)
			k.finish()
		})
	}
}
