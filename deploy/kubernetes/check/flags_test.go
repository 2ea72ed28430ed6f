package check

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"sigs.k8s.io/kustomize/kyaml/filesys"
)

// TestDriverKnowsItsFlags builds the driver and holds the arguments in the
// manifests against its flags.
func TestDriverKnowsItsFlags(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "csi-qcow2")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", binary, "./cmd/csi-qcow2")
	build.Dir = "../../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	standard := newStandard(t)
	for command, args := range map[string][]string{"node": standard.agent.Args, "controller": standard.central("driver").Args} {
		wantKnown(t, binary, command, args)
	}
	for _, dir := range overlays {
		c := newCluster(t, dir)
		wantKnown(t, binary, "node", c.agent.Args)
		wantKnown(t, binary, "holder", c.holder.Spec.Template.Spec.Containers[0].Args)
	}
	own := ownKustomization(t, "resources: [../overlays/standard]\ncomponents: [../components/metrics, ../components/snapshot-metadata]\n")
	for _, pod := range podsOf(render(t, filesys.MakeFsOnDisk(), own)) {
		wantKnown(t, binary, pod.Spec.Containers[0].Args[0], pod.Spec.Containers[0].Args)
	}
}

// wantKnown holds the arguments of a container against the help of a command.
func wantKnown(t *testing.T, binary, command string, args []string) {
	t.Helper()
	help, err := exec.Command(binary, command, "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("csi-qcow2 %s --help: %v\n%s", command, err, help)
	}
	known := map[string]bool{}
	for _, match := range regexp.MustCompile(`(?m)^\s+(?:-\w, )?--([a-z-]+)`).FindAllSubmatch(help, -1) {
		known[string(match[1])] = true
	}
	if len(args) < 2 || args[0] != command {
		t.Fatalf("the arguments of %s are %q", command, args)
	}
	for _, arg := range args[1:] {
		name, _, _ := strings.Cut(strings.TrimPrefix(arg, "--"), "=")
		if !known[name] {
			t.Errorf("csi-qcow2 %s has no flag --%s:\n%s", command, name, help)
		}
	}
}
