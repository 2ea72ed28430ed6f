package router_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"csi-qcow2/driver"
	"csi-qcow2/internal/pki"
)

// wantCode checks the code of err, and that its text has all of words.
func wantCode(t *testing.T, what string, err error, want codes.Code, words ...string) {
	t.Helper()
	if got := status.Code(err); got != want {
		t.Errorf("%s: %v: want code %s", what, err, want)
	}
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v: want %q in it", what, err, word)
		}
	}
}

func TestEachCallGoesToItsNode(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	ctx := t.Context()
	for _, node := range []string{"a", "b", "c"} {
		id := c.create("volume-"+node, node)
		if again := c.create("volume-"+node, node); again != id {
			t.Errorf("a retry made %s, the first attempt %s", again, id)
		}
		snap, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "snap-" + node, SourceVolumeId: id})
		if err != nil {
			t.Fatal(err)
		}
		restored := request("restored-" + node)
		restored.VolumeContentSource = fromSnapshot(snap.GetSnapshot().GetSnapshotId())
		for range 2 {
			resp, err := c.CreateVolume(ctx, restored)
			if err != nil || nodeOf(resp.GetVolume()) != node {
				t.Fatalf("a restore is at %v, %v: want %s", resp, err, node)
			}
		}
		if resp, err := c.ControllerExpandVolume(ctx, &csi.ControllerExpandVolumeRequest{VolumeId: id, CapacityRange: &csi.CapacityRange{RequiredBytes: 16 << 20}}); err != nil || resp.GetCapacityBytes() != 16<<20 {
			t.Errorf("expand: %v, %v", resp, err)
		}
		if resp, err := c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id}); err != nil || nodeOf(resp.GetVolume()) != node {
			t.Errorf("get: %v, %v", resp, err)
		}
		if _, err := c.ValidateVolumeCapabilities(ctx, &csi.ValidateVolumeCapabilitiesRequest{VolumeId: id, VolumeCapabilities: restored.VolumeCapabilities}); err != nil {
			t.Error(err)
		}
		if _, err := c.ControllerGetVolumeHealth(ctx, &csi.ControllerGetVolumeHealthRequest{VolumeId: id}); err != nil {
			t.Error(err)
		}
		if resp, err := c.GetSnapshot(ctx, &csi.GetSnapshotRequest{SnapshotId: snap.GetSnapshot().GetSnapshotId()}); err != nil || resp.GetSnapshot().GetSourceVolumeId() != id {
			t.Errorf("get snapshot: %v, %v", resp, err)
		}
		resp, err := c.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: topologies([]string{node})[0]})
		if err != nil || resp.GetAvailableCapacity() <= 0 {
			t.Errorf("capacity: %v, %v", resp, err)
		}
		for range 2 {
			if _, err := c.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: snap.GetSnapshot().GetSnapshotId()}); err != nil {
				t.Error(err)
			}
			if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
				t.Error(err)
			}
		}
		_, err = c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
		wantCode(t, "get a deleted volume", err, codes.NotFound)
	}
	resp, err := c.GetCapacity(ctx, &csi.GetCapacityRequest{})
	if err != nil || resp.GetAvailableCapacity() <= 0 {
		t.Errorf("capacity of all: %v, %v", resp, err)
	}
}

// TestNodeOfANewVolume: the preferred topology first, then a requisite one;
// without either, the name decides, and always in the same way.
func TestNodeOfANewVolume(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	req := request("x", "a", "b")
	req.AccessibilityRequirements.Preferred = topologies([]string{"b", "a"})
	if resp, err := c.CreateVolume(t.Context(), req); err != nil || nodeOf(resp.GetVolume()) != "b" {
		t.Errorf("preferred b: %v, %v", resp, err)
	}
	req = request("y", "c", "b")
	req.AccessibilityRequirements.Preferred = nil
	if resp, err := c.CreateVolume(t.Context(), req); err != nil || nodeOf(resp.GetVolume()) != "c" {
		t.Errorf("requisite c: %v, %v", resp, err)
	}
	used := make(map[string]bool)
	for i := range 40 {
		var nodes []string
		for range 2 {
			resp, err := c.CreateVolume(t.Context(), request(fmt.Sprint("anywhere-", i)))
			if err != nil {
				t.Fatal(err)
			}
			nodes = append(nodes, nodeOf(resp.GetVolume()))
		}
		if nodes[0] != nodes[1] {
			t.Errorf("a retry went to node %s, the first attempt to %s", nodes[1], nodes[0])
		}
		used[nodes[0]] = true
	}
	if len(used) != 3 {
		t.Errorf("40 volumes are on nodes %v only", used)
	}
	_, err := c.CreateVolume(t.Context(), request("z", "nowhere"))
	wantCode(t, "a node without an agent", err, codes.Unavailable, "nowhere")
	req = request("z")
	req.AccessibilityRequirements = &csi.TopologyRequirement{Requisite: []*csi.Topology{{Segments: map[string]string{"zone": "1"}}}}
	_, err = c.CreateVolume(t.Context(), req)
	wantCode(t, "a foreign topology", err, codes.ResourceExhausted, driver.TopologyKey(driver.DefaultName))
}

func TestRestoreIsMadeWhereItsSourceIs(t *testing.T) {
	c := newCluster(t, "a", "b")
	id := c.create("v", "b")
	snap, err := c.CreateSnapshot(t.Context(), &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
	if err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string]*csi.VolumeContentSource{"restore": fromSnapshot(snap.GetSnapshot().GetSnapshotId()), "clone": fromVolume(id)} {
		// The scheduler has chosen a; b is allowed.
		req := request(name, "a", "b")
		req.VolumeContentSource = source
		if resp, err := c.CreateVolume(t.Context(), req); err != nil || nodeOf(resp.GetVolume()) != "b" {
			t.Errorf("%s: %v, %v: want node b", name, resp, err)
		}
		req = request(name+" elsewhere", "a")
		req.VolumeContentSource = source
		_, err := c.CreateVolume(t.Context(), req)
		wantCode(t, name+" where only a is allowed", err, codes.ResourceExhausted, "node b", "allows a only")
	}
}

// TestNodeDown: calls for its volumes are UNAVAILABLE, those of others go on,
// and when it is back all is there.
func TestNodeDown(t *testing.T) {
	c := newCluster(t, "a", "b")
	ctx := t.Context()
	onA, onB := c.create("va", "a"), c.create("vb", "b")
	c.down("b")
	calls := map[string]func() error{
		"delete": func() error { _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: onB}); return err },
		"delete snapshot": func() error {
			_, err := c.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: strings.Replace(onB, "vol-", "snap-", 1)})
			return err
		},
		"get": func() error {
			_, err := c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: onB})
			return err
		},
		"list":   func() error { _, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{}); return err },
		"create": func() error { _, err := c.CreateVolume(ctx, request("vb", "b")); return err },
		"room": func() error {
			_, err := c.GetCapacity(ctx, &csi.GetCapacityRequest{AccessibleTopology: topologies([]string{"b"})[0]})
			return err
		},
	}
	for name, call := range calls {
		wantCode(t, name+" with node b down", call(), codes.Unavailable)
	}
	if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: onA}); err != nil {
		t.Errorf("delete on a: %v", err)
	}
	// A router that has never seen the node says the same.
	c.route(c.identity(pki.Controller))
	wantCode(t, "delete by a new router", calls["delete"](), codes.Unavailable, "no answer from b")
	// And so does one for which the node has left the cluster.
	b := c.nodes["b"]
	if err := c.pods.Delete(mustGet(t, c, "agent-b")); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "delete without a Pod", calls["delete"](), codes.Unavailable, "has left the cluster")

	c.start("b")
	c.publish(b, 1)
	waitFor(t, "node b to answer", func() bool { return calls["get"]() == nil })
	if id := c.create("vb", "b"); id != onB {
		t.Errorf("the volume is %s, was %s", id, onB)
	}
	if err := calls["delete"](); err != nil {
		t.Errorf("delete after the node is back: %v", err)
	}
}

func mustGet(t *testing.T, c *cluster, name string) any {
	t.Helper()
	pod, exists, err := c.pods.GetByKey(namespace + "/" + name)
	if err != nil || !exists {
		t.Fatalf("Pod %s: %v, %v", name, exists, err)
	}
	return pod
}

// waitFor waits for a condition, with a deadline for slow machines.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}

// TestNodeVanishesDuringACall: a call whose node stops answering keeps its
// deadline; one whose connection breaks ends at once.
func TestNodeVanishesDuringACall(t *testing.T) {
	c := newCluster(t, "a")
	id := c.create("v", "a")
	n := c.nodes["a"]
	c.down("a")
	l, err := net.Listen("tcp", c.address(n)) // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c.publish(n, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err = c.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: id})
	wantCode(t, "a silent node", err, codes.DeadlineExceeded)

	ended := make(chan error, 1)
	go func() { // ends when the connections below are closed
		_, err := c.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		ended <- err
	}()
	go func() { // ends when l is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	select {
	case err := <-ended:
		wantCode(t, "a broken connection", err, codes.Unavailable)
	case <-time.After(time.Minute):
		t.Fatal("the call has not ended")
	}
}

// TestMisdirectedCallsAreRefused: an address or a pool that has moved must not
// turn into a successful DeleteVolume.
func TestMisdirectedCallsAreRefused(t *testing.T) {
	c := newCluster(t, "a", "b")
	onA := c.create("va", "a")
	c.create("vb", "b")
	// Both agents end, and each other's node answers at the old addresses.
	c.down("a")
	c.down("b")
	config := pki.ServerConfig(c.identity(pki.Node), pki.Controller)
	a, b := c.nodes["a"], c.nodes["b"]
	a.pool, b.pool = b.pool, a.pool
	c.startAs("a", "b", config)
	c.startAs("b", "a", config)
	_, err := c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: onA})
	wantCode(t, "delete at the wrong agent", err, codes.Unavailable)
	c.down("a")
	c.down("b")
	// The pool has moved to the other node, and both say so.
	c.start("a")
	c.start("b")
	waitFor(t, "the pool to be found on node b", func() bool {
		resp, err := c.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: onA})
		return err == nil && nodeOf(resp.GetVolume()) == "b"
	})
	if _, err := c.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: onA}); err != nil {
		t.Error(err)
	}
}

// TestWrongCertificates: who is not the controller gets no answer from an
// agent, and the controller takes none from who is not an agent.
func TestWrongCertificates(t *testing.T) {
	c := newCluster(t, "a")
	id := c.create("v", "a")
	get := func() error {
		_, err := c.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		return err
	}
	stranger, _, err := (*pki.Authority)(nil).Renew(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := stranger.Issue(pki.Controller, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign.Bundle = c.authority.Certificates()
	expired, err := c.authority.Issue(pki.Controller, time.Now().Add(-60*24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for name, source := range map[string]pki.Source{
		"another CA's":       func() (*pki.Identity, error) { return foreign, nil },
		"an agent's":         c.identity(pki.Node),
		"an expired":         func() (*pki.Identity, error) { return expired, nil },
		"another role's":     c.identity(pki.Role{Name: "backup.csi-qcow2.internal"}),
		"a serving":          c.identity(pki.Role{Name: pki.Controller.Name, Serves: true}),
		"not yet any at all": func() (*pki.Identity, error) { return nil, fmt.Errorf("no certificate yet") },
	} {
		c.route(source)
		wantCode(t, name+" certificate", get(), codes.Unavailable)
	}
	c.route(c.identity(pki.Controller))
	if err := get(); err != nil {
		t.Errorf("the controller's certificate: %v", err)
	}
	// The other direction: an agent with another's certificate.
	c.down("a")
	c.startAs("a", "a", pki.ServerConfig(c.identity(pki.Controller), pki.Controller))
	wantCode(t, "an agent with the controller's certificate", get(), codes.Unavailable)
	c.down("a")
	imposter, err := stranger.Issue(pki.Node, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c.startAs("a", "a", pki.ServerConfig(func() (*pki.Identity, error) { return imposter, nil }, pki.Controller))
	wantCode(t, "an agent of another CA", get(), codes.Unavailable)
	// Plain gRPC, as a curious pod would try it.
	conn, err := net.Dial("tcp", c.address(c.nodes["a"]))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(5 * time.Minute))
	if b := make([]byte, 9); !closes(conn, b) {
		t.Error("an agent answers without TLS")
	}
}

// closes reports whether conn ends, after no more than a TLS alert.
func closes(conn net.Conn, b []byte) bool {
	for {
		n, err := conn.Read(b)
		if n > 0 && b[0] != 21 { // the record type of alerts
			return false
		}
		if err != nil {
			return true
		}
	}
}

// TestLists walks lists of every page size over all nodes.
func TestLists(t *testing.T) {
	c := newCluster(t, "a", "b", "c")
	ctx := t.Context()
	var volumes, snapshots []string
	for _, node := range []string{"a", "c"} { // b stays empty
		for i := range 3 {
			id := c.create(fmt.Sprint("v-", node, i), node)
			volumes = append(volumes, id)
			snap, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: fmt.Sprint("s-", node, i), SourceVolumeId: id})
			if err != nil {
				t.Fatal(err)
			}
			snapshots = append(snapshots, snap.GetSnapshot().GetSnapshotId())
		}
	}
	slices.Sort(volumes)
	slices.Sort(snapshots)
	for size := range int32(8) {
		var gotVolumes, gotSnapshots []string
		token := ""
		for pages := 0; pages == 0 || token != ""; pages++ {
			resp, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: size, StartingToken: token})
			if err != nil || size > 0 && len(resp.GetEntries()) > int(size) || pages > 10 {
				t.Fatalf("pages of %d: %v, %v", size, resp, err)
			}
			for _, e := range resp.GetEntries() {
				gotVolumes = append(gotVolumes, e.GetVolume().GetVolumeId())
			}
			token = resp.GetNextToken()
		}
		for pages := 0; pages == 0 || token != ""; pages++ {
			resp, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{MaxEntries: size, StartingToken: token})
			if err != nil || size > 0 && len(resp.GetEntries()) > int(size) || pages > 10 {
				t.Fatalf("pages of %d: %v, %v", size, resp, err)
			}
			for _, e := range resp.GetEntries() {
				gotSnapshots = append(gotSnapshots, e.GetSnapshot().GetSnapshotId())
			}
			token = resp.GetNextToken()
		}
		slices.Sort(gotVolumes)
		slices.Sort(gotSnapshots)
		if !slices.Equal(gotVolumes, volumes) || !slices.Equal(gotSnapshots, snapshots) {
			t.Errorf("pages of %d: %d volumes and %d snapshots, want %d and %d", size, len(gotVolumes), len(gotSnapshots), len(volumes), len(snapshots))
		}
	}
	for i, id := range snapshots {
		resp, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id})
		if err != nil || len(resp.GetEntries()) != 1 {
			t.Errorf("snapshot %d: %v, %v", i, resp, err)
		}
	}
	if resp, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SourceVolumeId: volumes[0]}); err != nil || len(resp.GetEntries()) != 1 {
		t.Errorf("snapshots of a volume: %v, %v", resp, err)
	}
	if resp, err := c.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: "foreign"}); err != nil || len(resp.GetEntries()) != 0 {
		t.Errorf("a foreign snapshot: %v, %v", resp, err)
	}
	if resp, err := c.ControllerListVolumeHealth(ctx, &csi.ControllerListVolumeHealthRequest{}); err != nil || len(resp.GetEntries()) != 0 {
		t.Errorf("health: %v, %v", resp, err)
	}
	_, err := c.ListVolumes(ctx, &csi.ListVolumesRequest{StartingToken: "x"})
	wantCode(t, "a bad token", err, codes.Aborted, `"x"`)
	_, err = c.ListVolumes(ctx, &csi.ListVolumesRequest{MaxEntries: -1})
	wantCode(t, "a negative page", err, codes.InvalidArgument)
}

func TestForeignAndMissingIDs(t *testing.T) {
	c := newCluster(t, "a")
	ctx := t.Context()
	for _, id := range []string{"../x", "vol-1", "pvc-0"} {
		if _, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: id}); err != nil {
			t.Errorf("delete %q: %v", id, err)
		}
		if _, err := c.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id}); err != nil {
			t.Errorf("delete snapshot %q: %v", id, err)
		}
		_, err := c.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: "s", SourceVolumeId: id})
		wantCode(t, "snapshot of "+id, err, codes.NotFound)
	}
	_, err := c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{})
	wantCode(t, "no ID", err, codes.InvalidArgument)
	_, err = c.DeleteVolume(ctx, &csi.DeleteVolumeRequest{VolumeId: "vol-00000000-00000000000000000000000000000000"})
	wantCode(t, "an unknown pool", err, codes.Unavailable, "pool 00000000")
}

// TestCapabilitiesAreTheAgents: what the router promises without an agent is
// what an agent promises.
func TestCapabilitiesAreTheAgents(t *testing.T) {
	c := newCluster(t)
	ctx := t.Context()
	plugin, err := c.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil || len(plugin.GetCapabilities()) < 3 {
		t.Errorf("plugin: %v, %v", plugin, err)
	}
	controller, err := c.ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
	if err != nil || len(controller.GetCapabilities()) < 10 {
		t.Errorf("controller: %v, %v", controller, err)
	}
	if info, err := c.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{}); err != nil || info.GetName() != driver.DefaultName {
		t.Errorf("info: %v, %v", info, err)
	}
	if probe, err := c.Probe(ctx, &csi.ProbeRequest{}); err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe: %v, %v", probe, err)
	}
	_, err = c.CreateVolume(ctx, request("v"))
	wantCode(t, "create without an agent", err, codes.Unavailable)
}

// TestGroups: all members on one node, or none.
func TestGroups(t *testing.T) {
	c := newCluster(t, "a", "b")
	ctx := t.Context()
	a1, a2, b1 := c.create("a1", "a"), c.create("a2", "a"), c.create("b1", "b")
	_, err := c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{a1, b1}})
	wantCode(t, "a group on two nodes", err, codes.FailedPrecondition, "node a", "node b")
	_, err = c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g"})
	wantCode(t, "an empty group", err, codes.InvalidArgument)
	_, err = c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{"x"}})
	wantCode(t, "a foreign member", err, codes.NotFound)
	var id string
	var members []string
	for range 2 {
		resp, err := c.CreateVolumeGroupSnapshot(ctx, &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: []string{a1, a2}})
		if err != nil || len(resp.GetGroupSnapshot().GetSnapshots()) != 2 {
			t.Fatalf("group: %v, %v", resp, err)
		}
		if id != "" && id != resp.GetGroupSnapshot().GetGroupSnapshotId() {
			t.Error("a retry made another group")
		}
		id, members = resp.GetGroupSnapshot().GetGroupSnapshotId(), nil
		for _, s := range resp.GetGroupSnapshot().GetSnapshots() {
			members = append(members, s.GetSnapshotId())
		}
	}
	if _, err := c.GetVolumeGroupSnapshot(ctx, &csi.GetVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: members}); err != nil {
		t.Error(err)
	}
	for range 2 {
		if _, err := c.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: id, SnapshotIds: members}); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.DeleteVolumeGroupSnapshot(ctx, &csi.DeleteVolumeGroupSnapshotRequest{GroupSnapshotId: "foreign"}); err != nil {
		t.Error(err)
	}
}

// TestReplacedAgent: a Pod that ends is left for the one that follows.
func TestReplacedAgent(t *testing.T) {
	c := newCluster(t, "a")
	id := c.create("v", "a")
	n := c.nodes["a"]
	c.down("a")
	c.start("a")
	c.publish(n, 1)
	waitFor(t, "the new agent", func() bool {
		_, err := c.ControllerGetVolume(t.Context(), &csi.ControllerGetVolumeRequest{VolumeId: id})
		return err == nil
	})
}

// TestUnhealthy: what is wrong is told of the nodes that answer.
func TestUnhealthy(t *testing.T) {
	c := newCluster(t, "a", "b")
	id, other := c.create("v", "a"), c.create("w", "b")
	c.down("a")
	record := filepath.Join(c.nodes["a"].pool, "volumes", id, "volume.json")
	if err := os.WriteFile(record, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.start("a")
	var all []*csi.VolumeHealth
	waitFor(t, "the agent that is back", func() (ok bool) {
		var err error
		all, _, err = c.router.Unhealthy(t.Context())
		return err == nil
	})
	if len(all) != 1 || all[0].GetVolumeId() != id || all[0].GetHealthStatuses()[0].GetReason() != "RecordDamaged" {
		t.Errorf("unhealthy are %v", all)
	}
	c.down("b")
	all, asked, err := c.router.Unhealthy(t.Context())
	if len(all) != 1 || err == nil || !strings.Contains(err.Error(), "node b") {
		t.Errorf("with node b down: %v, %v", all, err)
	}
	if !asked(id) || asked(other) {
		t.Errorf("with node b down: asked about a volume of node a: %t, of b: %t", asked(id), asked(other))
	}
}

// A restless index has another Pod for each agent whenever it is looked at.
type restless struct {
	cache.Indexer
	looks atomic.Int64
}

func (r *restless) Index(name string, like any) ([]any, error) {
	all, err := r.Indexer.Index(name, like)
	look := r.looks.Add(1)
	for i := range all {
		pod := all[i].(*corev1.Pod).DeepCopy()
		pod.UID = types.UID(fmt.Sprint(look))
		all[i] = pod
	}
	return all, err
}

// TestGroupWhileTheAgentIsReplaced: one node stays one node.
func TestGroupWhileTheAgentIsReplaced(t *testing.T) {
	c := newCluster(t, "a")
	ids := []string{c.create("a1", "a"), c.create("a2", "a")}
	c.pods = &restless{Indexer: c.pods}
	c.route(c.identity(pki.Controller))
	resp, err := c.CreateVolumeGroupSnapshot(t.Context(), &csi.CreateVolumeGroupSnapshotRequest{Name: "g", SourceVolumeIds: ids})
	if err != nil || len(resp.GetGroupSnapshot().GetSnapshots()) != 2 {
		t.Errorf("got %v, %v", resp, err)
	}
}
