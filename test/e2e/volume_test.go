package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// TestFilesystemVolume: a claim waits for its first pod; what one pod writes
// the next one reads.
func TestFilesystemVolume(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ class, size, fstype string }{
		{classDefault, "64Mi", "ext4"},
		{classXFS, "320Mi", "xfs"},
	} {
		t.Run(c.fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.claim("data", c.size, class(c.class))
			s.event("PersistentVolumeClaim", "data", "WaitForFirstConsumer")
			if phase := s.getClaim("data").Status.Phase; phase != corev1.ClaimPending {
				t.Fatalf("claim without a pod is %s, want Pending", phase)
			}

			s.start("writer", s.withClaim("data"))
			s.want("filesystem", s.sh("writer", "awk '$2 == \""+mountPath+"\" { print $3 }' /proc/mounts"), c.fstype)
			sum := s.write("writer", mountPath+"/noise", 16)
			volume := s.bound("data")
			if volume.Spec.CSI == nil || volume.Spec.CSI.Driver != driverName {
				t.Fatalf("volume %s has source %+v, want driver %s", volume.Name, volume.Spec.PersistentVolumeSource, driverName)
			}
			if got := affinity(volume); got != nodeName() {
				t.Fatalf("volume %s is bound to node %q, want %q", volume.Name, got, nodeName())
			}
			s.stop("writer")

			s.start("reader", s.withClaim("data"))
			s.want("content", s.sum("reader", mountPath+"/noise", 16), sum)
		})
	}
}

// affinity returns the node that a volume is bound to.
func affinity(v *corev1.PersistentVolume) string {
	if v.Spec.NodeAffinity == nil || v.Spec.NodeAffinity.Required == nil {
		return ""
	}
	for _, term := range v.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range term.MatchExpressions {
			if e.Key == topologyKey && len(e.Values) == 1 {
				return e.Values[0]
			}
		}
	}
	return ""
}

// TestBlockVolume: a raw device has the size that was asked for, holds what is
// written, and reads as zeroes before.
func TestBlockVolume(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("disk", "64Mi", block)
	s.start("writer", s.withClaim("disk"))
	if got := s.deviceBytes("writer"); got != 64<<20 {
		t.Fatalf("device of 64Mi has %d bytes", got)
	}
	s.want("first content", s.sum("writer", devicePath, 64), s.sh("writer", "dd if=/dev/zero bs=1M count=64 2>/dev/null | sha256sum"))
	sum := s.write("writer", devicePath, 64)
	s.stop("writer")
	s.start("reader", s.withClaim("disk"))
	s.want("content", s.sum("reader", devicePath, 64), sum)
	s.want("discard", s.sh("reader", "blkdiscard "+devicePath+" && dd if="+devicePath+" bs=1M count=64 2>/dev/null | tr -d '\\0' | wc -c"), "0")
}

// TestExpandOnline: a claim grows under a running pod, and so do its
// filesystem or its device; what was in it stays.
func TestExpandOnline(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, class, from, to string
		options               []claimOption
		file                  string
	}{
		{"ext4", classDefault, "64Mi", "256Mi", nil, mountPath + "/noise"},
		{"xfs", classXFS, "320Mi", "640Mi", nil, mountPath + "/noise"},
		{"block", classDefault, "64Mi", "256Mi", []claimOption{block}, devicePath},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.claim("data", c.from, append(c.options, class(c.class))...)
			s.start("pod", s.withClaim("data"))
			sum := s.write("pod", c.file, 16)
			s.ask("data", c.to)
			if c.name == "ext4" && !mayGrowExt4(t) {
				// The kernel refuses, the claim says why, and the next pod has the room.
				s.described("data", "CAP_SYS_RESOURCE")
				s.want("content", s.sum("pod", c.file, 16), sum)
				s.stop("pod")
				s.start("pod", s.withClaim("data"))
			}
			s.expanded("data", c.to)
			bytes := s.filesystemBytes
			if c.file == devicePath {
				bytes = s.deviceBytes
			}
			// A filesystem keeps some of its volume to itself.
			want := resource.MustParse(c.to)
			eventually(t, "larger "+c.name, func(context.Context) error {
				if got := bytes("pod"); got < want.Value()*3/4 {
					return fmt.Errorf("size is %d, want about %s", got, c.to)
				}
				return nil
			})
			s.want("content", s.sum("pod", c.file, 16), sum)
			s.want("restarts", fmt.Sprint(s.restarts("pod")), "0")
			s.stop("pod")
			s.start("again", s.withClaim("data"))
			s.want("content", s.sum("again", c.file, 16), sum)
		})
	}
}

// ask asks for a larger claim.
func (s *space) ask(claim, size string) {
	s.t.Helper()
	patch := fmt.Sprintf(`{"spec":{"resources":{"requests":{"storage":%q}}}}`, size)
	if _, err := client.CoreV1().PersistentVolumeClaims(s.name).Patch(s.t.Context(), claim, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// expanded waits until a claim says that it has this size.
func (s *space) expanded(claim, size string) {
	s.t.Helper()
	want := resource.MustParse(size)
	eventually(s.t, "expansion of "+claim, func(ctx context.Context) error {
		c, err := client.CoreV1().PersistentVolumeClaims(s.name).Get(ctx, claim, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := c.Status.Capacity[corev1.ResourceStorage]; got.Cmp(want) < 0 {
			return fmt.Errorf("capacity is %s, conditions %+v", got.String(), c.Status.Conditions)
		}
		return nil
	})
}

// mayGrowExt4 reports whether this machine may grow a mounted ext4: the kernel
// asks for CAP_SYS_RESOURCE, which some virtual machines do not give away.
func mayGrowExt4(t *testing.T) bool {
	t.Helper()
	if value, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0); err == nil && value == 1 {
		return true
	}
	t.Log("WITHOUT CAP_SYS_RESOURCE: a mounted ext4 cannot grow on this machine")
	return false
}

// TestEphemeralVolume: a generic ephemeral volume comes and goes with its pod.
func TestEphemeralVolume(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	standard := classDefault
	s.start("pod", withVolume(corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{
		VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &standard,
			AccessModes:      []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("64Mi")},
			},
		}},
	}}))
	s.write("pod", mountPath+"/noise", 8)
	volume := s.bound("pod-volume").Name
	s.stop("pod")
	eventually(t, "end of volume "+volume, func(ctx context.Context) error {
		_, err := client.CoreV1().PersistentVolumes().Get(ctx, volume, metav1.GetOptions{})
		return wantGone(err)
	})
}

// TestReadWriteOncePod: a second pod waits until the first has gone.
func TestReadWriteOncePod(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("data", "64Mi", access(corev1.ReadWriteOncePod))
	s.start("first", s.withClaim("data"))
	s.write("first", mountPath+"/noise", 1)
	s.submit("second", s.withClaim("data"))
	s.event("Pod", "second", "ReadWriteOncePod")
	s.stop("first")
	s.running("second")
	s.sh("second", "test -s "+mountPath+"/noise")
}

// TestSharedByPods: pods of one node share a ReadWriteOnce volume.
func TestSharedByPods(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.start("first", s.withClaim("data"))
	s.start("second", s.withClaim("data"))
	sum := s.write("first", mountPath+"/noise", 4)
	s.want("content", s.sum("second", mountPath+"/noise", 4), sum)
	s.stop("first")
	s.want("content after the first pod", s.sum("second", mountPath+"/noise", 4), sum)
}

// TestFSGroup: files of a volume belong to the group that a pod asks for.
func TestFSGroup(t *testing.T) {
	t.Parallel()
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			group := func(id int64) podOption {
				user := int64(1000)
				return func(p *corev1.Pod) {
					p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, FSGroup: &id}
				}
			}
			if fstype == "xfs" {
				s.claim("data", "320Mi", class(classXFS))
			} else {
				s.claim("data", "64Mi")
			}
			s.start("first", s.withClaim("data"), group(2000))
			s.sh("first", "echo hello >"+mountPath+"/file")
			s.want("group of the root", s.sh("first", "stat -c %g "+mountPath), "2000")
			s.want("group of a new file", s.sh("first", "stat -c %g "+mountPath+"/file"), "2000")
			s.stop("first")
			s.start("second", s.withClaim("data"), group(3000))
			s.want("group of an old file", s.sh("second", "stat -c %g "+mountPath+"/file"), "3000")
			s.sh("second", "echo more >>"+mountPath+"/file")
		})
	}
}

// TestReadOnly: a pod that asks for it reads and cannot write.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.start("writer", s.withClaim("data"))
	sum := s.write("writer", mountPath+"/noise", 4)
	s.start("beside", s.withClaim("data"), readOnly)
	s.want("content beside a writer", s.sum("beside", mountPath+"/noise", 4), sum)
	s.refused("beside", "echo x >"+mountPath+"/new", "read-only file system")
	s.stop("beside")
	s.stop("writer")
	s.start("alone", s.withClaim("data"), readOnly)
	s.want("content", s.sum("alone", mountPath+"/noise", 4), sum)
	s.refused("alone", "rm "+mountPath+"/noise", "read-only file system")
}

// TestManyVolumes: one pod with a volume in use for each of many claims.
func TestManyVolumes(t *testing.T) {
	t.Parallel()
	const many = 12
	s := newSpace(t)
	for i := range many {
		s.claim(fmt.Sprintf("data-%d", i), "32Mi")
	}
	s.start("pod", func(p *corev1.Pod) {
		for i := range many {
			name := fmt.Sprintf("data-%d", i)
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
				PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name},
			}})
			p.Spec.Containers[0].VolumeMounts = append(p.Spec.Containers[0].VolumeMounts, corev1.VolumeMount{Name: name, MountPath: mountPath + "/" + name})
		}
	})
	var sums []string
	for i := range many {
		sums = append(sums, s.write("pod", fmt.Sprintf("%s/data-%d/noise", mountPath, i), 4))
	}
	for i := range many {
		s.want("content", s.sum("pod", fmt.Sprintf("%s/data-%d/noise", mountPath, i), 4), sums[i])
	}
}

// TestStats: the kubelet reports what a volume holds.
func TestStats(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("data", "64Mi")
	s.start("pod", s.withClaim("data"))
	s.write("pod", mountPath+"/noise", 16)
	begin := time.Now()
	eventually(t, "statistics of the volume", func(ctx context.Context) error {
		var summary struct {
			Pods []struct {
				PodRef  struct{ Namespace string }
				Volumes []struct {
					Name                      string `json:"name"`
					UsedBytes, AvailableBytes int64
				} `json:"volume"`
			}
		}
		if err := kubeletStats(ctx, &summary); err != nil {
			return err
		}
		for _, p := range summary.Pods {
			for _, v := range p.Volumes {
				if p.PodRef.Namespace == s.name && v.Name == "volume" && v.UsedBytes >= 16<<20 && v.AvailableBytes > 0 {
					return nil
				}
			}
		}
		return fmt.Errorf("no volume with 16 MiB used after %s", time.Since(begin).Round(time.Second))
	})
}
