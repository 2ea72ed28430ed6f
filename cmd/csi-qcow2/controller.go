package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"csi-qcow2/driver"
	"csi-qcow2/internal/pki"
	"csi-qcow2/router"
	"csi-qcow2/router/lead"
)

func newControllerCommand() *cobra.Command {
	f := defaultControllerFlags()
	cmd := &cobra.Command{
		Use:   "controller",
		Short: "Serve CSI for a cluster, by forwarding calls to the nodes",
		Long: `Serve the controller side of CSI for a whole cluster: each call is forwarded to
the node agent that owns the volume, over mutual TLS. It keeps no state. One
replica, the leader, makes and renews the certificates and takes start-up taints
off nodes; all replicas forward.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.validate(); err != nil {
				return usageErrorf("%v", err)
			}
			return runController(cmd.Context(), f)
		},
	}
	f.add(cmd.Flags())
	return cmd
}

// How often the controller looks at its certificates, nodes and volumes.
const (
	certificatesEvery = 30 * time.Second
	taintsEvery       = 5 * time.Second
	healthEvery       = 15 * time.Second
)

// clientConfig says how to reach the API server.
func (f *controllerFlags) clientConfig() (*rest.Config, error) {
	if f.kubeconfig == "" {
		return rest.InClusterConfig()
	}
	return clientcmd.BuildConfigFromFlags("", f.kubeconfig)
}

// runController serves until ctx ends.
func runController(ctx context.Context, f controllerFlags) (err error) {
	f.log.apply()
	config, err := f.clientConfig()
	if err != nil {
		return fmt.Errorf("reach the API server: %w", err)
	}
	config.UserAgent = "csi-qcow2-controller/" + version
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}

	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var workers sync.WaitGroup
	defer workers.Wait()
	defer stop()

	pods := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(f.namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = f.selector }))
	agents := pods.Core().V1().Pods().Lister().Pods(f.namespace)
	all := informers.NewSharedInformerFactory(client, 0)
	nodeLister := all.Core().V1().Nodes().Lister()
	volumes := all.Core().V1().PersistentVolumes().Informer()
	if err := volumes.AddIndexers(lead.Indexers(f.driverName)); err != nil {
		return err
	}
	for _, factory := range []informers.SharedInformerFactory{pods, all} {
		factory.Start(background.Done())
		defer factory.Shutdown()
	}
	defer stop() // before the factories shut down
	pods.WaitForCacheSync(ctx.Done())
	all.WaitForCacheSync(ctx.Done())

	certificates := &lead.Certificates{
		Secrets: client.CoreV1().Secrets(f.namespace), Authority: f.authority, Now: time.Now,
		Issue: map[string]pki.Role{f.nodeSecret: pki.Node},
	}
	if f.metadata.secret != "" {
		resources, err := dynamic.NewForConfig(config)
		if err != nil {
			return err
		}
		certificates.Issue[f.metadata.secret] = pki.Role{Name: f.metadata.host, Serves: true}
		certificates.Publish = lead.PublishMetadataCA(resources, f.driverName)
	}
	workers.Go(func() {
		lead.Repeat(background, "load certificate", lead.Task{Every: certificatesEvery, Do: certificates.Load})
	})

	observed := router.NewMetrics()
	r, err := router.New(router.Options{
		Name: f.driverName, Version: version, Agents: agents, Port: f.nodePort,
		TLS: pki.ClientConfig(certificates.Own, pki.Node), Observe: observed.Observe,
	})
	if err != nil {
		return err
	}
	events := record.NewBroadcaster(record.WithContext(background))
	events.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	defer events.Shutdown()
	health := &lead.Events{
		Recorder: events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: f.driverName}),
		Volumes:  volumes.GetIndexer(), Unhealthy: r.Unhealthy,
	}
	tasks := map[string]lead.Task{
		"renew certificates": {Every: certificatesEvery, Do: certificates.Renew},
		"tell users":         {Every: healthEvery, Do: health.Tell},
	}
	if f.startupTaint != "" {
		taints := &lead.Taints{Nodes: client.CoreV1().Nodes(), Lister: nodeLister, Key: f.startupTaint,
			Label: driver.TopologyKey(f.driverName), Ready: r.Ready}
		tasks["remove start-up taints"] = lead.Task{Every: taintsEvery, Do: taints.Remove}
	}
	election := lead.Options{Client: client, Namespace: f.namespace, Lease: f.lease, Identity: f.identity, Tasks: tasks}
	led := make(chan error, 1)
	workers.Go(func() { led <- lead.Run(background, election) })

	if f.metrics != "" {
		workers.Go(func() {
			lead.Repeat(background, "serve metrics", lead.Task{Every: time.Hour, Do: func(ctx context.Context) error {
				return serveMetrics(ctx, f.metrics, observed)
			}})
		})
	}

	path, err := driver.ParseEndpoint(f.endpoint)
	if err != nil {
		return err
	}
	l, err := driver.Listen(path)
	if err != nil {
		return errors.Join(err, r.Close())
	}
	klog.InfoS("serving", "endpoint", path, "driver", f.driverName, "identity", f.identity, "version", version)
	err = r.Serve(ctx, l, f.drain)
	klog.InfoS("stopped", "endpoint", path)
	stop()
	return errors.Join(err, <-led)
}
