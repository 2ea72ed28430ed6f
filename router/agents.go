package router

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"csi-qcow2/driver"
)

const (
	// pingEvery and pingTimeout bound how long a call waits for a node that
	// has vanished without closing its connections. Agents allow pings every 5 s.
	pingEvery   = 10 * time.Second
	pingTimeout = 5 * time.Second
	// dialTimeout bounds one attempt to connect.
	dialTimeout = 5 * time.Second
	// maxReply bounds the reply of an agent: a list of all its volumes.
	maxReply = 64 << 20 // bytes
)

// agents holds the connections to the agents that Kubernetes knows.
type agents struct {
	opts Options

	mu     sync.Mutex
	byNode map[string]*agent // guarded by mu
	closed bool              // guarded by mu
}

// An agent is the node process in one Pod.
type agent struct {
	node string
	pod  types.UID
	addr string
	conn *grpc.ClientConn

	mu    sync.Mutex
	pools []string // IDs; nil while it is not known; guarded by mu
}

func newAgents(o Options) agents { return agents{opts: o, byNode: make(map[string]*agent)} }

// all returns the agents in the order of their nodes' names.
func (a *agents) all() ([]*agent, error) {
	pods, err := a.opts.Agents.List(labels.Everything())
	if err != nil {
		return nil, status.Errorf(codes.Unavailable, "list the node agents: %v", err)
	}
	best := make(map[string]*corev1.Pod)
	for _, pod := range pods {
		if pod.Spec.NodeName != "" && pod.Status.PodIP != "" && better(pod, best[pod.Spec.NodeName]) {
			best[pod.Spec.NodeName] = pod
		}
	}
	return a.connect(best)
}

// better reports whether pod rather than other is the agent of their node: one
// that stays rather than one that is being replaced, then the younger.
func better(pod, other *corev1.Pod) bool {
	ended := func(p *corev1.Pod) bool {
		return p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded
	}
	switch {
	case other == nil:
		return true
	case ended(pod) != ended(other):
		return ended(other)
	}
	return pod.CreationTimestamp.After(other.CreationTimestamp.Time)
}

// connect returns the agents in pods, with a connection each, and closes the
// connections of those that are gone.
func (a *agents) connect(pods map[string]*corev1.Pod) ([]*agent, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, status.Error(codes.Unavailable, "the controller is stopping")
	}
	for node, known := range a.byNode {
		pod := pods[node]
		if pod == nil || pod.UID != known.pod || a.address(pod) != known.addr {
			_ = known.conn.Close() // fails only when closed already
			delete(a.byNode, node)
		}
	}
	var all []*agent
	for node, pod := range pods {
		known := a.byNode[node]
		if known == nil {
			conn, err := a.dial(node, a.address(pod))
			if err != nil {
				return nil, status.Errorf(codes.Unavailable, "agent of node %s: %v", node, err)
			}
			known = &agent{node: node, pod: pod.UID, addr: a.address(pod), conn: conn}
			a.byNode[node] = known
		}
		all = append(all, known)
	}
	slices.SortFunc(all, func(x, y *agent) int { return strings.Compare(x.node, y.node) })
	return all, nil
}

func (a *agents) address(pod *corev1.Pod) string {
	return net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(a.opts.Port))
}

// dial returns a connection that is made when it is used. Every call on it
// says which node it is for.
func (a *agents) dial(node, addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(credentials.NewTLS(a.opts.TLS)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: dialTimeout,
			Backoff: backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second}}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReply)),
		grpc.WithNoProxy(),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			begin := time.Now()
			err := invoke(metadata.AppendToOutgoingContext(ctx, driver.NodeHeader, node), method, req, reply, conn, opts...)
			err = a.explain(node, err)
			a.observe(method, node, err, time.Since(begin))
			return err
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			begin := time.Now()
			s, err := stream(metadata.AppendToOutgoingContext(ctx, driver.NodeHeader, node), desc, conn, method, opts...)
			err = a.explain(node, err)
			a.observe(method, node, err, time.Since(begin))
			return s, err
		}),
	)
}

// explain makes the failure of a connection readable, and forgets what is
// known of an agent that is not what it was.
func (a *agents) explain(node string, err error) error {
	if status.Code(err) != codes.Unavailable {
		return err
	}
	a.mu.Lock()
	known := a.byNode[node]
	a.mu.Unlock()
	if known != nil {
		known.setPools(nil)
	}
	return status.Errorf(codes.Unavailable, "node %s: %s", node, status.Convert(err).Message())
}

func (a *agents) observe(method, node string, err error, took time.Duration) {
	if a.opts.Observe != nil {
		a.opts.Observe(method, node, err, took)
	}
}

func (a *agents) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	var errs []error
	for _, known := range a.byNode {
		errs = append(errs, known.conn.Close())
	}
	clear(a.byNode)
	return errors.Join(errs...)
}

func (g *agent) setPools(pools []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pools = pools
}

// has reports whether g is known to have pool, and whether it is known at all.
func (g *agent) has(pool string) (has, known bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Contains(g.pools, pool), g.pools != nil
}

// identify asks g for its pools.
func (g *agent) identify(ctx context.Context) error {
	info, err := csi.NewIdentityClient(g.conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return err
	}
	if node := info.GetManifest()[driver.ManifestNode]; node != g.node {
		return status.Errorf(codes.Unavailable, "at %s is the agent of node %q, not of %q", g.addr, node, g.node)
	}
	g.setPools(strings.Split(info.GetManifest()[driver.ManifestPools], ","))
	return nil
}
