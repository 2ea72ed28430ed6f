package sanity

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"csi-qcow2/volume"
)

// volumeCommand runs `csi-qcow2 volume` against p.
func (p *process) volumeCommand(args ...string) (string, error) {
	args = append([]string{"volume", "--endpoint", "unix://" + p.socket(), "--pool", p.pool()}, args...)
	out, err := exec.Command(p.binary, args...).CombinedOutput()
	return string(out), err
}

// An operator looks at volumes and reverts one, while the node agent runs.
func TestVolumeCommand(t *testing.T) {
	p, k := startNode(t)
	id := k.create("pvc", 256, nil, "ext4")
	k.use("pvc", id, "ext4")
	file := filepath.Join(k.target("pvc"), "file")
	writeFile(t, file, []byte("before"))
	snap := k.snapshot("monday", id)
	writeFile(t, file, []byte("after"))
	later := k.snapshot("tuesday", id)

	if out, err := p.volumeCommand("tree"); err != nil || !strings.Contains(out, "pvc") || !strings.Contains(out, "@ monday") || !strings.Contains(out, "attached") {
		t.Errorf("tree: %v\n%s", err, out)
	}
	out, err := p.volumeCommand("du", "--output", "json")
	var reports []volume.Report
	if err == nil {
		err = json.Unmarshal([]byte(out), &reports)
	}
	if err != nil || len(reports) != 1 || len(reports[0].Volumes) != 1 || reports[0].Volumes[0].Usage == nil || len(reports[0].Volumes[0].Snapshots) != 2 {
		t.Errorf("du: %v\n%s", err, out)
	}
	if out, err := p.volumeCommand("revert", "pvc", "monday"); err == nil || !strings.Contains(out, "staged") {
		t.Errorf("revert of a staged volume: %v\n%s", err, out)
	}
	k.unuse("pvc", id)
	if out, err := p.volumeCommand("revert", "pvc", "monday"); err != nil {
		t.Fatalf("revert: %v\n%s", err, out)
	}
	k.use("pvc", id, "ext4")
	wantFile(t, file, []byte("before"))
	k.unuse("pvc", id)
	if out, err := p.volumeCommand("revert", id, later); err != nil {
		t.Fatalf("revert to the later one: %v\n%s", err, out)
	}
	k.use("pvc", id, "ext4")
	wantFile(t, file, []byte("after"))
	k.dispose("pvc", id)
	for _, id := range []string{snap, later} {
		k.deleteSnapshot(id)
	}
	k.finish()
}
