package lead

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	corelisters "k8s.io/client-go/listers/core/v1"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/pki"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	m.Run()
}

const namespace = "csi-qcow2"

func emptySecret(name string) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
}

// newCertificates returns Certificates at a time that the test sets.
func newCertificates(client *fake.Clientset, now *time.Time) *Certificates {
	return &Certificates{Secrets: client.CoreV1().Secrets(namespace), Authority: "ca", Issue: map[string]pki.Role{"node": pki.Node}, Now: func() time.Time { return *now }}
}

func TestCertificates(t *testing.T) {
	now := time.Now()
	client := fake.NewClientset(emptySecret("ca"), emptySecret("node"))
	leader, other := newCertificates(client, &now), newCertificates(client, &now)
	ctx := t.Context()
	if err := other.Load(ctx); err == nil {
		t.Error("there is no CA yet, and Load succeeds")
	}
	if _, err := other.Own(); err == nil {
		t.Error("there is an identity before the first Load")
	}
	node := func() string {
		t.Helper()
		secret, err := client.CoreV1().Secrets(namespace).Get(ctx, "node", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(secret.Data) != 3 || slices.ContainsFunc([]string{pki.CertificateName, pki.KeyName, pki.BundleName}, func(k string) bool { return len(secret.Data[k]) == 0 }) {
			t.Fatalf("the Secret of the agents has %d keys", len(secret.Data))
		}
		return string(secret.Data[pki.CertificateName])
	}
	renewed := make(map[string]bool)
	owned := make(map[string]bool)
	for range 400 { // days: more than a CA lives
		if err := errors.Join(leader.Renew(ctx), leader.Renew(ctx), leader.Load(ctx), other.Load(ctx), other.Load(ctx)); err != nil {
			t.Fatal(err)
		}
		renewed[node()] = true
		id, err := other.Own()
		if err != nil {
			t.Fatal(err)
		}
		owned[string(id.Certificate)] = true
		now = now.Add(24 * time.Hour)
	}
	for what, n := range map[string]int{"agents": len(renewed), "a replica": len(owned)} {
		if n < 400/30 || n > 400/10 {
			t.Errorf("%d certificates of %s in 400 days", n, what)
		}
	}
	for _, action := range client.Actions() {
		if verb := action.GetVerb(); verb != "get" && verb != "update" {
			t.Errorf("the controller may not %s Secrets", verb)
		}
	}
}

func TestCertificatesWithoutTheirSecrets(t *testing.T) {
	now := time.Now()
	damaged := emptySecret("ca")
	damaged.Data = map[string][]byte{pki.BundleName: []byte("x")}
	for word, client := range map[string]*fake.Clientset{
		"apply the manifests": fake.NewClientset(),
		"remove its data":     fake.NewClientset(damaged, emptySecret("node")),
	} {
		c := newCertificates(client, &now)
		for _, err := range []error{c.Renew(t.Context()), c.Load(t.Context())} {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%v: want %q in it", err, word)
			}
		}
	}
}

func TestStartupTaints(t *testing.T) {
	const key, label = "csi-qcow2.dev/agent-not-ready", "topology.csi-qcow2.dev/node"
	taint := func(key string) corev1.Taint { return corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule} }
	node := func(name string, registered bool, taints ...corev1.Taint) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{Taints: taints}}
		if registered {
			n.Labels = map[string]string{label: name}
		}
		return n
	}
	nodes := []*corev1.Node{
		node("ready", true, taint("other"), taint(key)),
		node("sick", true, taint(key)),
		node("unregistered", false, taint(key)),
		node("plain", true, taint("other")),
	}
	client := fake.NewClientset()
	index := cache.NewIndexer(cache.MetaNamespaceKeyFunc, nil)
	for _, n := range nodes {
		if _, err := client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		index.Add(n)
	}
	client.ClearActions()
	taints := &Taints{
		Nodes: client.CoreV1().Nodes(), Lister: corelisters.NewNodeLister(index), Key: key, Label: label,
		Ready: func(_ context.Context, node string) error {
			if node == "sick" {
				return errors.New("no pool")
			}
			return nil
		},
	}
	if err := taints.Remove(t.Context()); err == nil || !strings.Contains(err.Error(), "sick") {
		t.Errorf("%v: want it to name the sick node", err)
	}
	for name, want := range map[string][]string{"ready": {"other"}, "sick": {key}, "unregistered": {key}, "plain": {"other"}} {
		n, err := client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, taint := range n.Spec.Taints {
			got = append(got, taint.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("node %s has taints %v, want %v", name, got, want)
		}
	}
	// What the lister says is old: another has changed the taints since.
	n, err := client.CoreV1().Nodes().Get(t.Context(), "ready", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n.Spec.Taints = []corev1.Taint{taint("new"), taint(key)}
	if _, err := client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := taints.Remove(t.Context()); err == nil {
		t.Error("taints were replaced that were not what was read")
	}
}

// TestOneLeads: of two replicas one does the tasks; when it goes the other does.
func TestOneLeads(t *testing.T) {
	client := fake.NewClientset()
	var running, overlaps atomic.Int32
	begun := make(chan string, 100)
	run := func(name string) (stop func()) {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { // ends with ctx
			done <- Run(ctx, Options{Client: client, Namespace: namespace, Lease: "l", Identity: name, Tasks: map[string]Task{
				"t": {Every: time.Hour, Do: func(ctx context.Context) error {
					if running.Add(1) > 1 {
						overlaps.Add(1)
					}
					begun <- name
					<-ctx.Done()
					running.Add(-1)
					return nil
				}},
			}})
		}()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	next := func() string {
		select {
		case name := <-begun:
			return name
		case <-time.After(2 * time.Minute):
			t.Fatal("nobody leads after two minutes")
			return ""
		}
	}
	stops := map[string]func(){"a": run("a"), "b": run("b")}
	first := next()
	stops[first]()
	delete(stops, first)
	if second := next(); second == first {
		t.Errorf("%s leads again after its end", second)
	}
	for _, stop := range stops {
		stop()
	}
	if overlaps.Load() > 0 {
		t.Error("two led at once")
	}
}

// TestRepeatTriesAgainSoon: a task that fails does not wait for its turn.
func TestRepeatTriesAgainSoon(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	calls := 0
	Repeat(ctx, "t", Task{Every: time.Hour, Do: func(context.Context) error {
		if calls++; calls == 2 {
			cancel()
		}
		return errors.New("x")
	}})
	if calls != 2 {
		t.Errorf("%d calls in a minute", calls)
	}
}

// TestUpdatesNameTheirVersion: a leader that has been replaced overwrites nothing.
func TestUpdatesNameTheirVersion(t *testing.T) {
	now := time.Now()
	ca := emptySecret("ca")
	ca.ResourceVersion = "7"
	client := fake.NewClientset(ca, emptySecret("node"))
	client.PrependReactor("update", "secrets", func(action clienttesting.Action) (bool, runtime.Object, error) {
		secret := action.(clienttesting.UpdateAction).GetObject().(*corev1.Secret)
		if secret.Name == "ca" && secret.ResourceVersion == "" {
			t.Error("an update without the version that was read")
		}
		return false, nil, nil
	})
	if err := newCertificates(client, &now).Renew(t.Context()); err != nil {
		t.Fatal(err)
	}
}
