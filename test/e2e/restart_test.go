package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// restarting is a writer that appends numbered lines and syncs each before it
// says so: what it says must be there after whatever happens.
const restarting = "cd /data; i=$(wc -l 2>/dev/null <log || echo 0); while :; do i=$((i+1)); echo $i >>log && sync log && echo $i; done"

// TestContainerRestart: a container that dies finds its volume as it left it.
func TestContainerRestart(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.start("pod", s.withClaim("data"))
	sum := s.write("pod", mountPath+"/noise", 8)
	before := s.restarts("pod")
	kill(t, "shell of the pod", func(cmdline []string, cgroup string) bool {
		return cmdline[0] == "sh" && strings.Contains(cgroup, s.uid("pod"))
	})
	eventually(t, "restart of the container", func(context.Context) error {
		if n := s.restarts("pod"); n == before {
			return fmt.Errorf("restarted %d times, as before", n)
		}
		return nil
	})
	s.running("pod")
	s.want("content", s.sum("pod", mountPath+"/noise", 8), sum)
}

// TestKubeletRestart: the death of the kubelet touches no pod, and the next
// kubelet knows the volumes of the last.
func TestKubeletRestart(t *testing.T) {
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.claim("disk", "64Mi", block)
	s.start("pod", s.withClaim("data"), command(restarting))
	s.start("raw", s.withClaim("disk"))
	sum := s.write("raw", devicePath, 8)
	restart(t, "kubelet")
	eventually(t, "service of the next kubelet", func(context.Context) error {
		_, err := s.try("pod", "true")
		return err
	})
	s.want("restarts", fmt.Sprint(s.restarts("pod")), "0")
	s.want("content of the device", s.sum("raw", devicePath, 8), sum)
	s.complete("pod")
	s.stop("pod") // the new kubelet unpublishes what the old one published
	s.stop("raw")
	s.start("again", s.withClaim("data"))
	s.complete("again")
}

// TestAgentKilled: the node agent dies under load, again and again. Pods do not
// notice: what they were told is durable is there, and they go on.
func TestAgentKilled(t *testing.T) {
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.claim("disk", "64Mi", block)
	s.start("pod", s.withClaim("data"), command(restarting))
	s.start("raw", s.withClaim("disk"))
	sum := s.write("raw", devicePath, 16)
	for range 3 {
		said := s.said("pod", 20)
		killAgent(t)
		s.said("pod", said+20)
		s.want("restarts", fmt.Sprint(s.restarts("pod")), "0")
		s.want("content of the device", s.sum("raw", devicePath, 16), sum)
		s.freshVolume()
	}
	s.snapshot("taken", "data")
	said := s.said("pod", 20)
	s.stop("pod")
	s.start("pod", s.withClaim("data"), command(restarting))
	if now := s.complete("pod"); now < said {
		t.Fatalf("%d lines in the next pod, the last one had synced %d", now, said)
	}
}

// TestAgentReplaced: the agent's pod is deleted under load, as an upgrade does,
// and the next one takes its volumes over; then the holder's, and the agent again.
// Pods do not notice.
func TestAgentReplaced(t *testing.T) {
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.start("pod", s.withClaim("data"), command(restarting))
	said := s.said("pod", 20)
	for _, replaced := range []string{"node", "holder", "node"} {
		replacePod(t, replaced)
		said = s.said("pod", said+20)
		s.want("restarts", fmt.Sprint(s.restarts("pod")), "0")
		s.freshVolume()
	}
	s.stop("pod")
	s.unstaged("data")
	s.start("pod", s.withClaim("data"), command(restarting))
	if now := s.complete("pod"); now < said {
		t.Fatalf("%d lines after the replacement, the writer had synced %d before", now, said)
	}
}

// TestSidecarsKilled: a sidecar that dies at any time is started again, and
// what it was asked for happens.
func TestSidecarsKilled(t *testing.T) {
	s := newSpace(t)
	for i, sidecar := range []string{"csi-provisioner", "csi-snapshotter", "csi-resizer"} {
		killSidecar := func() {
			kill(t, sidecar, func(cmdline []string, _ string) bool { return cmdline[0] == "/bin/"+sidecar })
		}
		source, taken, restored := fmt.Sprintf("source-%d", i), fmt.Sprintf("taken-%d", i), fmt.Sprintf("restored-%d", i)
		s.claim(source, "320Mi", class(classXFS))
		s.submit(source, s.withClaim(source))
		killSidecar()
		s.running(source)
		sum := s.write(source, mountPath+"/noise", 4)
		s.snapshot(taken, source)
		s.claim(restored, "320Mi", class(classXFS), fromSnapshot(taken))
		s.submit(restored, s.withClaim(restored))
		s.running(restored)
		s.want("restored content", s.sum(restored, mountPath+"/noise", 4), sum)
		s.ask(source, "640Mi")
		s.expanded(source, "640Mi")
	}
	eventually(t, "rest of the sidecars", agentReady)
}

// freshVolume: the agent serves new volumes.
func (s *space) freshVolume() {
	s.t.Helper()
	s.claim("fresh", "32Mi")
	s.start("fresh", s.withClaim("fresh"))
	s.write("fresh", mountPath+"/noise", 1)
	s.stop("fresh")
	s.deleteClaim("fresh")
}

// unstaged waits until the kubelet has let go of a claim's volume.
func (s *space) unstaged(claim string) {
	s.t.Helper()
	handle := s.bound(claim).Spec.CSI.VolumeHandle
	eventually(s.t, "unstaging of "+claim, func(ctx context.Context) error {
		n, err := client.CoreV1().Nodes().Get(ctx, nodeName(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, used := range n.Status.VolumesInUse {
			if strings.HasSuffix(string(used), handle) {
				return fmt.Errorf("node %s uses %s", n.Name, used)
			}
		}
		return nil
	})
}

// said waits until the writer of a pod has said that it had synced this many
// lines, and returns the last.
func (s *space) said(pod string, lines int64) int64 {
	s.t.Helper()
	var last int64
	eventually(s.t, "lines of "+pod, func(ctx context.Context) (err error) {
		if last, err = s.lastLine(ctx, pod); err == nil && last < lines {
			err = fmt.Errorf("%d lines so far, want %d", last, lines)
		}
		return err
	})
	return last
}

// complete checks that the writer's lines are all there and returns their number.
func (s *space) complete(pod string) int64 {
	s.t.Helper()
	lines := s.number(pod, "wc -l <"+mountPath+"/log")
	s.want("lines out of order", s.sh(pod, "head -n "+fmt.Sprint(lines)+" "+mountPath+"/log | awk '$1 != NR' | head -3"), "")
	return lines
}
