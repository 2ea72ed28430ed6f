package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	driverName      = "csi-qcow2.dev"
	driverNamespace = "csi-qcow2"
	topologyKey     = "topology." + driverName + "/node"
	poolDir         = "/var/lib/csi-qcow2"
	smallPoolDir    = "/var/lib/csi-qcow2-small"
	image           = "localhost/e2e/busybox:1"
)

// StorageClasses, from deploy/kubernetes and from overlay/common.
const (
	classDefault = "csi-qcow2"
	classXFS     = "xfs"
	classSmall   = "small"
)

// deadline is for one step of a test on a slow and loaded machine.
const deadline = 4 * time.Minute

// The cluster; set by TestMain.
var (
	config    *rest.Config
	client    kubernetes.Interface
	snapshots snapshotclient.Interface
)

func TestMain(m *testing.M) {
	if err := connect(); err != nil {
		fmt.Fprintln(os.Stderr, "e2e: no cluster, run hack/e2e.sh up deploy test:", err)
		os.Exit(1)
	}
	code := m.Run()
	for _, left := range leftovers() {
		fmt.Fprintln(os.Stderr, "e2e: left behind:", left)
		code = 1
	}
	os.Exit(code)
}

func connect() (err error) {
	if config, err = clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG")); err != nil {
		return err
	}
	config.QPS, config.Burst = 100, 200
	if client, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if snapshots, err = snapshotclient.NewForConfig(config); err != nil {
		return err
	}
	_, err = client.StorageV1().CSIDrivers().Get(context.Background(), driverName, metav1.GetOptions{})
	return err
}

// onlyStandard passes a test of what the other shapes of deploy/kubernetes do
// not have, saying so.
func onlyStandard(t *testing.T, why string) {
	t.Helper()
	if shape := os.Getenv("SHAPE"); shape != "standard" {
		t.Skipf("NOT TESTED in the shape %s: %s", shape, why)
	}
}

// leftovers lists what must not be there when no test has a volume any more.
func leftovers() []string {
	var left []string
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for {
		left = left[:0]
		for _, dir := range []string{poolDir, smallPoolDir} {
			for _, pattern := range []string{"volumes/*", "incoming/*"} {
				names, _ := filepath.Glob(filepath.Join(dir, pattern)) // the pattern is well-formed
				left = append(left, names...)
			}
		}
		left = append(left, loopDevices()...)
		if len(left) == 0 || ctx.Err() != nil {
			return left
		}
		time.Sleep(pollInterval)
	}
}

// loopDevices lists the loop devices on files of the driver.
func loopDevices() []string {
	var found []string
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file") // the pattern is well-formed
	for _, name := range names {
		file, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(file), "/run/csi-qcow2/") {
			found = append(found, name+": "+string(file))
		}
	}
	return found
}

const pollInterval = 200 * time.Millisecond

// eventually polls until done returns no error.
func eventually(t *testing.T, what string, done func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for {
		err := done(ctx)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(pollInterval):
		}
	}
}
