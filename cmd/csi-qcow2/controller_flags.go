package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/labels"

	"csi-qcow2/driver"
)

// controllerFlags are the flags of `csi-qcow2 controller`.
type controllerFlags struct {
	endpoint     string
	driverName   string
	kubeconfig   string
	namespace    string
	identity     string
	lease        string
	selector     string
	nodePort     int
	authority    string
	nodeSecret   string
	metadata     metadataFlags
	startupTaint string
	metrics      string
	drain        time.Duration
	log          logFlags
}

// metadataFlags are about the certificate of the snapshot metadata sidecar,
// which serves backup programs.
type metadataFlags struct{ secret, host string }

func defaultControllerFlags() controllerFlags {
	host, err := os.Hostname()
	if err != nil {
		host = "" // --identity is required then
	}
	return controllerFlags{
		endpoint:     "unix:///csi/csi.sock",
		driverName:   driver.DefaultName,
		namespace:    "csi-qcow2",
		identity:     host,
		lease:        "csi-qcow2-controller",
		selector:     "app.kubernetes.io/name=csi-qcow2,app.kubernetes.io/component=node",
		nodePort:     defaultRemotePort,
		authority:    "csi-qcow2-ca",
		nodeSecret:   "csi-qcow2-node-tls",
		startupTaint: driver.DefaultName + "/agent-not-ready",
		drain:        defaultDrain,
		log:          defaultLogFlags(),
	}
}

func (f *controllerFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.endpoint, "endpoint", f.endpoint, "unix socket to serve CSI on")
	flags.StringVar(&f.driverName, "driver-name", f.driverName, "CSI driver name, also the domain of the topology key")
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "how to reach the API server; empty inside a cluster")
	flags.StringVar(&f.namespace, "namespace", f.namespace, "namespace of the node agents, the Secrets and the Lease")
	flags.StringVar(&f.identity, "identity", f.identity, "name of this replica in the election")
	flags.StringVar(&f.lease, "lease", f.lease, "name of the Lease of the election")
	flags.StringVar(&f.selector, "node-selector", f.selector, "labels of the Pods of the node agents")
	flags.IntVar(&f.nodePort, "node-port", f.nodePort, "TCP port of the node agents, their --remote-address")
	flags.StringVar(&f.authority, "ca-secret", f.authority, "Secret in which the controller keeps its CA; it must exist, and may be empty")
	flags.StringVar(&f.nodeSecret, "node-secret", f.nodeSecret, "Secret for the certificate of the node agents, which they mount as their --tls-dir; it must exist, and may be empty")
	flags.StringVar(&f.metadata.secret, "snapshot-metadata-secret", "", "Secret for the certificate of the snapshot metadata sidecar, which must exist, and may be empty; the CA goes into the SnapshotMetadataService of the driver's name. Empty without that sidecar")
	flags.StringVar(&f.metadata.host, "snapshot-metadata-host", "", "host name in the address of the SnapshotMetadataService")
	flags.StringVar(&f.startupTaint, "startup-taint", f.startupTaint, "taint to take off nodes whose agent is ready; empty for none")
	flags.StringVar(&f.metrics, "metrics-address", "", "TCP address to serve /metrics and /healthz on; empty for none")
	flags.DurationVar(&f.drain, "drain-timeout", f.drain, "how long running calls may take to finish after SIGTERM")
	f.log.add(flags)
}

// validate returns all problems at once.
func (f *controllerFlags) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := driver.ParseEndpoint(f.endpoint); err != nil {
		fail("--endpoint: %w", err)
	}
	if !driver.ValidName(f.driverName) {
		fail("--driver-name %q: want a domain name of at most 63 characters", f.driverName)
	}
	for name, value := range map[string]string{"namespace": f.namespace, "identity": f.identity, "lease": f.lease, "ca-secret": f.authority, "node-secret": f.nodeSecret} {
		if value == "" {
			fail("--%s is empty", name)
		}
	}
	if _, err := labels.Parse(f.selector); err != nil || f.selector == "" {
		fail("--node-selector %q: want labels of the node agents' Pods", f.selector)
	}
	if (f.metadata.secret == "") != (f.metadata.host == "") {
		fail("--snapshot-metadata-secret and --snapshot-metadata-host: want both or neither")
	}
	if f.nodePort < 1 || f.nodePort > 65535 {
		fail("--node-port %d: want 1 to 65535", f.nodePort)
	}
	if f.drain <= 0 || f.drain > time.Hour {
		fail("--drain-timeout %s: want more than 0, at most 1h", f.drain)
	}
	return errors.Join(append(errs, checkAddress("--metrics-address", f.metrics), f.log.validate())...)
}
