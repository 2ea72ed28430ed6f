package check

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDriverKnowsItsFlags builds the driver and holds the arguments in the
// manifest against the flags of `csi-qcow2 node`.
func TestDriverKnowsItsFlags(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "csi-qcow2")
	build := exec.Command("go", "build", "-o", binary, "./cmd/csi-qcow2")
	build.Dir = "../../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	help, err := exec.Command(binary, "node", "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("csi-qcow2 node --help: %v\n%s", err, help)
	}
	known := map[string]bool{}
	for _, match := range regexp.MustCompile(`(?m)^\s+(?:-\w, )?--([a-z-]+)`).FindAllSubmatch(help, -1) {
		known[string(match[1])] = true
	}
	args := newCluster(t, "overlays/small").agent.Args
	if len(args) < 5 || args[0] != "node" {
		t.Fatalf("the driver's arguments are %q", args)
	}
	for _, arg := range args[1:] {
		name, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		if !known[name] {
			t.Errorf("csi-qcow2 node has no flag --%s:\n%s", name, help)
		}
	}
}
