package router_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"csi-qcow2/driver"
	"csi-qcow2/internal/pki"
	"csi-qcow2/nbdexport"
	"csi-qcow2/router"
	"csi-qcow2/volume"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	goleak.VerifyTestMain(m)
}

// A cluster is a router over node agents, all with real pools and real TLS.
type cluster struct {
	t         *testing.T
	authority *pki.Authority
	port      int
	pods      cache.Indexer
	nodes     map[string]*node
	router    *router.Router
	observed  chan string // method and node of each call that failed
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.SnapshotMetadataClient
}

// A node is an agent and what outlives its process.
type node struct {
	name, addr string
	pool, run  string
	stop       func() // nil while it is down
}

const namespace = "csi-qcow2"

// newCluster starts a router, and an agent on each of the nodes.
func newCluster(t *testing.T, names ...string) *cluster {
	t.Helper()
	authority, _, err := (*pki.Authority)(nil).Renew(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{
		t: t, authority: authority, nodes: make(map[string]*node), observed: make(chan string, 1000),
		pods: cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}),
	}
	for i, name := range names {
		dir := t.TempDir()
		n := &node{name: name, addr: fmt.Sprintf("127.0.7.%d", i+1), pool: filepath.Join(dir, "pool"), run: filepath.Join(dir, "run")}
		for _, d := range []string{n.pool, n.run} {
			if err := os.Mkdir(d, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		c.nodes[name] = n
	}
	c.freePort()
	for _, name := range names {
		c.start(name)
	}
	c.route(c.identity(pki.Controller))
	return c
}

// freePort finds a port that is free at all addresses.
func (c *cluster) freePort() {
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			c.t.Fatal(err)
		}
		c.port = l.Addr().(*net.TCPAddr).Port
		l.Close()
		free := true
		for _, n := range c.nodes {
			l, err := net.Listen("tcp", c.address(n))
			if free = err == nil; !free {
				break
			}
			l.Close()
		}
		if free {
			return
		}
	}
	c.t.Fatal("no free port")
}

func (c *cluster) address(n *node) string { return net.JoinHostPort(n.addr, strconv.Itoa(c.port)) }

// identity returns a source with a new certificate of the cluster's CA.
func (c *cluster) identity(role pki.Role) pki.Source {
	c.t.Helper()
	id, err := c.authority.Issue(role, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return func() (*pki.Identity, error) { return id, nil }
}

// start starts the agent of a node, and makes it known to Kubernetes.
func (c *cluster) start(name string) {
	c.t.Helper()
	c.startAs(name, name, pki.ServerConfig(c.identity(pki.Node), pki.Controller))
}

// startAs starts an agent on a node that says it is the agent of id.
func (c *cluster) startAs(name, id string, config *tls.Config) {
	c.t.Helper()
	n := c.nodes[name]
	pool, err := volume.Open(c.t.Context(), n.pool, volume.Options{})
	if err != nil {
		c.t.Fatal(err)
	}
	d, err := driver.New(c.t.Context(), driver.Options{
		Version: "test", NodeID: id, Pools: map[string]*volume.Pool{"default": pool},
		Attacher: noDevices{}, Host: driver.NewHost(), RunDir: n.run,
	})
	if err != nil {
		c.t.Fatal(err)
	}
	l, err := net.Listen("tcp", c.address(n))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.ServeRemote(ctx, l, config, time.Minute) }() // ends with ctx
	n.stop = func() {
		cancel()
		if err := errors.Join(<-served, d.Close(), pool.Close()); err != nil {
			c.t.Errorf("agent of %s: %v", name, err)
		}
		n.stop = nil
	}
	c.t.Cleanup(func() {
		if n.stop != nil {
			n.stop()
		}
	})
	c.publish(n, 0)
}

// publish makes the agent's Pod known; each generation is another Pod.
func (c *cluster) publish(n *node, generation int) {
	c.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "agent-" + n.name, UID: types.UID(fmt.Sprint(n.name, generation))},
		Spec:       corev1.PodSpec{NodeName: n.name},
		Status:     corev1.PodStatus{PodIP: n.addr, Phase: corev1.PodRunning},
	}
	if err := c.pods.Update(pod); err != nil {
		c.t.Fatal(err)
	}
}

// down stops the agent of a node. Its Pod stays, as when a node loses power.
func (c *cluster) down(name string) { c.nodes[name].stop() }

// route starts a router with an identity, and makes it the one that is called.
func (c *cluster) route(id pki.Source) {
	c.t.Helper()
	r, err := router.New(router.Options{
		Version: "test", Agents: corelisters.NewPodLister(c.pods).Pods(namespace), Port: c.port,
		TLS: pki.ClientConfig(id, pki.Node),
		Observe: func(method, node string, err error, _ time.Duration) {
			if err != nil {
				c.observed <- method + " " + node
			}
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.router = r
	l, err := net.Listen("unix", filepath.Join(c.t.TempDir(), "s"))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.Serve(ctx, l, time.Minute) }() // ends with ctx
	conn, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		conn.Close()
		cancel()
		if err := <-served; err != nil {
			c.t.Errorf("router: %v", err)
		}
	})
	c.IdentityClient, c.ControllerClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn)
	c.GroupControllerClient, c.SnapshotMetadataClient = csi.NewGroupControllerClient(conn), csi.NewSnapshotMetadataClient(conn)
}

// noDevices is the attacher of agents whose volumes nobody stages: what else
// they ask of it is a panic.
type noDevices struct{ driver.Attacher }

func (noDevices) Stale(context.Context) ([]nbdexport.StaleDevice, error) { return nil, nil }

// request asks for a volume; nodes are its topology, the preferred one first.
func request(name string, nodes ...string) *csi.CreateVolumeRequest {
	req := &csi.CreateVolumeRequest{
		Name:          name,
		CapacityRange: &csi.CapacityRange{RequiredBytes: 8 << 20},
		VolumeCapabilities: []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		}},
	}
	if len(nodes) > 0 {
		req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: topologies(nodes), Preferred: topologies(nodes)}
	}
	return req
}

func topologies(nodes []string) []*csi.Topology {
	var all []*csi.Topology
	for _, n := range nodes {
		all = append(all, &csi.Topology{Segments: map[string]string{driver.TopologyKey(driver.DefaultName): n}})
	}
	return all
}

// create makes a volume on a node and returns its ID.
func (c *cluster) create(name, node string) string {
	c.t.Helper()
	resp, err := c.CreateVolume(c.t.Context(), request(name, node))
	if err != nil {
		c.t.Fatal(err)
	}
	if got := nodeOf(resp.GetVolume()); got != node {
		c.t.Fatalf("volume %s is on node %s, want %s", name, got, node)
	}
	return resp.GetVolume().GetVolumeId()
}

func nodeOf(v *csi.Volume) string {
	return v.GetAccessibleTopology()[0].GetSegments()[driver.TopologyKey(driver.DefaultName)]
}

func fromSnapshot(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: id}}}
}

func fromVolume(id string) *csi.VolumeContentSource {
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: id}}}
}
