package sanity

import (
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// What one run of both modes must consist of. A new capability, or a new
// version of the suite, changes these numbers on purpose or not at all.
const wantPassed = 166

// wantSkipped are the skips that are explained by what the driver does not
// declare, and how often each occurs in both modes together.
var wantSkipped = map[string]int{
	// A volume is used on the node that holds it: nothing to publish on a controller.
	"ControllerPublishVolume not supported":             14,
	"ControllerUnpublishVolume not supported":           2,
	"Controller Publish, UnpublishVolume not supported": 4,
	// Not declared.
	"ControllerModifyVolume not supported":             12,
	"Modify volume not supported":                      2,
	"Modify Volume not supported":                      2,
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported": 2,
}

func TestSanity(t *testing.T) {
	p := newProcess(t)
	p.start()
	gomega.RegisterFailHandler(ginkgo.Fail)
	var contexts []*sanity.TestContext
	for _, mode := range []string{"mount", "block"} {
		config := sanity.NewTestConfig()
		config.Address = "unix://" + p.socket()
		config.TargetPath = p.path(mode + "-target")
		config.StagingPath = p.path(mode + "-staging")
		config.TestVolumeAccessType = mode
		ginkgo.Describe(mode+" mode", func() { contexts = append(contexts, sanity.GinkgoTest(&config)) })
	}
	var report types.Report
	ginkgo.ReportAfterSuite("specs run", func(r types.Report) { report = r })
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.EmitSpecProgress = false
	reporter.Succinct = true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
	for _, sc := range contexts {
		sc.Finalize()
	}
	wantSpecs(t, report)

	p.wait("the pool to be empty", func() bool { return len(volumes(t, p)) == 0 })
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	if _, err := os.Lstat(p.socket()); !os.IsNotExist(err) {
		t.Errorf("the socket is left: %v", err)
	}
	p.wantNothingLeft()
}

// wantSpecs checks that the specs that were to run did run.
func wantSpecs(t *testing.T, report types.Report) {
	t.Helper()
	passed, skipped := 0, make(map[string]int)
	for _, spec := range report.SpecReports {
		if spec.LeafNodeType != types.NodeTypeIt {
			continue
		}
		switch spec.State {
		case types.SpecStatePassed:
			passed++
		case types.SpecStateSkipped:
			skipped[spec.Failure.Message]++
		case types.SpecStatePending: // the suite's own XIt
		default:
			t.Errorf("%s: %s", spec.State, spec.FullText())
		}
	}
	if passed != wantPassed {
		t.Errorf("%d specs passed, want %d", passed, wantPassed)
	}
	if got, want := list(skipped), list(wantSkipped); got != want {
		t.Errorf("skipped:\n%swant:\n%s", got, want)
	}
}

func list(m map[string]int) string {
	var lines []string
	for reason, n := range m {
		lines = append(lines, fmt.Sprintf("%4d %s\n", n, reason))
	}
	sort.Strings(lines)
	return strings.Join(lines, "")
}

// volumes lists the volumes in the pool, tombstones included.
func volumes(t *testing.T, p *process) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(p.pool(), "volumes", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}
