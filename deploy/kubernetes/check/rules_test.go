package check

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
)

// A cluster is what a kustomization renders to, taken apart.
type cluster struct {
	objects  []runtime.Object
	driver   *storagev1.CSIDriver
	class    *storagev1.StorageClass
	snapshot *snapshotv1.VolumeSnapshotClass
	node     *appsv1.DaemonSet
	pod      *corev1.PodSpec // of node
	agent    *corev1.Container
	holder   *appsv1.DaemonSet
}

func newCluster(t *testing.T, dir string) *cluster {
	t.Helper()
	c := &cluster{objects: manifests(t, dir)}
	var errs [3]error
	c.driver, errs[0] = only[*storagev1.CSIDriver](c.objects)
	c.class, errs[1] = only[*storagev1.StorageClass](c.objects)
	c.snapshot, errs[2] = only[*snapshotv1.VolumeSnapshotClass](c.objects)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	sets := all[*appsv1.DaemonSet](c.objects)
	if len(sets) != 2 || sets[0].Name != "csi-qcow2-holder" || sets[1].Name != "csi-qcow2-node" {
		t.Fatalf("%s: %d DaemonSets, want the holder and the node agent, in this order", dir, len(sets))
	}
	c.holder, c.node = sets[0], sets[1]
	c.pod = &c.node.Spec.Template.Spec
	c.agent = c.container("driver")
	if c.agent == nil {
		t.Fatalf("%s: no container is named driver", dir)
	}
	return c
}

func (c *cluster) container(name string) *corev1.Container {
	for i := range c.pod.Containers {
		if c.pod.Containers[i].Name == name {
			return &c.pod.Containers[i]
		}
	}
	return nil
}

// sidecars returns the containers beside the driver's.
func (c *cluster) sidecars() []*corev1.Container {
	var found []*corev1.Container
	for i := range c.pod.Containers {
		if c.pod.Containers[i].Name != "driver" {
			found = append(found, &c.pod.Containers[i])
		}
	}
	return found
}

func (c *cluster) volume(name string) *corev1.Volume {
	for i := range c.pod.Volumes {
		if c.pod.Volumes[i].Name == name {
			return &c.pod.Volumes[i]
		}
	}
	return nil
}

func (c *cluster) mount(container *corev1.Container, volume string) *corev1.VolumeMount {
	for i := range container.VolumeMounts {
		if container.VolumeMounts[i].Name == volume {
			return &container.VolumeMounts[i]
		}
	}
	return nil
}

// flag returns the value of --name= among a container's arguments.
func flag(container *corev1.Container, name string) string {
	for _, arg := range container.Args {
		if value, ok := strings.CutPrefix(arg, "--"+name+"="); ok {
			return value
		}
	}
	return ""
}

// A rule is something that holds in every cluster, and a change it notices.
type rule struct {
	name  string
	check func(c *cluster) error
	spoil func(c *cluster)
}

// hold returns an error unless ok.
func hold(ok bool, format string, args ...any) error {
	if ok {
		return nil
	}
	return fmt.Errorf(format, args...)
}

var rules = []rule{
	{
		"one driver name",
		func(c *cluster) error {
			name := c.driver.Name
			path := "/var/lib/kubelet/plugins/" + name
			return errors.Join(
				hold(c.class.Provisioner == name, "the StorageClass is of %q", c.class.Provisioner),
				hold(c.snapshot.Driver == name, "the VolumeSnapshotClass is of %q", c.snapshot.Driver),
				hold(c.volume("plugin").HostPath.Path == path, "the socket's host directory is %q", c.volume("plugin").HostPath.Path),
				hold(flag(c.container("node-driver-registrar"), "kubelet-registration-path") == path+"/csi.sock", "the registrar tells kubelet another path"),
			)
		},
		func(c *cluster) { c.snapshot.Driver = "other.dev" },
	},
	{
		"driver object",
		func(c *cluster) error {
			s := c.driver.Spec
			return errors.Join(
				hold(!ptr.Deref(s.AttachRequired, true), "attachRequired: there is no attacher"),
				hold(ptr.Deref(s.FSGroupPolicy, "") == storagev1.FileFSGroupPolicy, "fsGroupPolicy"),
				hold(ptr.Deref(s.StorageCapacity, false), "storageCapacity"),
				hold(!ptr.Deref(s.SELinuxMount, false), "seLinuxMount: kubelet would pass -o context, which the driver refuses"),
				hold(!ptr.Deref(s.PodInfoOnMount, true), "podInfoOnMount: nothing reads it"),
				hold(slices.Equal(s.VolumeLifecycleModes, []storagev1.VolumeLifecycleMode{storagev1.VolumeLifecyclePersistent}), "volumeLifecycleModes: inline volumes bypass the class"),
				hold(len(s.TokenRequests) == 0, "tokenRequests: nothing uses one"),
			)
		},
		func(c *cluster) {
			c.driver.Spec.VolumeLifecycleModes = append(c.driver.Spec.VolumeLifecycleModes, storagev1.VolumeLifecycleEphemeral)
		},
	},
	{
		"storage class",
		func(c *cluster) error {
			return errors.Join(
				hold(ptr.Deref(c.class.VolumeBindingMode, "") == storagev1.VolumeBindingWaitForFirstConsumer, "a volume must wait for its pod's node"),
				hold(ptr.Deref(c.class.AllowVolumeExpansion, false), "allowVolumeExpansion"),
			)
		},
		func(c *cluster) { c.class.VolumeBindingMode = ptr.To(storagev1.VolumeBindingImmediate) },
	},
	{
		"only the driver is privileged",
		func(c *cluster) error {
			err := hold(ptr.Deref(c.agent.SecurityContext.Privileged, false), "the driver must be: it mounts with Bidirectional propagation")
			for _, s := range c.sidecars() {
				x := s.SecurityContext
				err = errors.Join(err, hold(x != nil && !ptr.Deref(x.Privileged, false) && !ptr.Deref(x.AllowPrivilegeEscalation, true) &&
					x.Capabilities != nil && slices.Equal(x.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(x.Capabilities.Add) == 0,
					"%s is not confined", s.Name))
			}
			return err
		},
		func(c *cluster) { c.sidecars()[0].SecurityContext.AllowPrivilegeEscalation = nil },
	},
	{
		"root filesystems are read-only",
		func(c *cluster) (err error) {
			for _, container := range c.pod.Containers {
				err = errors.Join(err, hold(ptr.Deref(container.SecurityContext.ReadOnlyRootFilesystem, false), "%s may write to its own", container.Name))
			}
			return err
		},
		func(c *cluster) { c.agent.SecurityContext.ReadOnlyRootFilesystem = ptr.To(false) },
	},
	{
		"no host namespace",
		func(c *cluster) error {
			return hold(!c.pod.HostNetwork && !c.pod.HostPID && !c.pod.HostIPC, "the pod shares a namespace with the host")
		},
		func(c *cluster) { c.pod.HostPID = true },
	},
	{
		"host paths are listed and typed",
		func(c *cluster) (err error) {
			want := map[string]corev1.HostPathType{
				"/var/lib/kubelet":                       corev1.HostPathDirectory,
				"/var/lib/kubelet/plugins/csi-qcow2.dev": corev1.HostPathDirectoryOrCreate,
				"/var/lib/kubelet/plugins_registry":      corev1.HostPathDirectory,
				"/var/lib/csi-qcow2":                     corev1.HostPathDirectory, // a pool whose disk is missing must not be made
				"/run/csi-qcow2":                         corev1.HostPathDirectoryOrCreate,
				"/dev":                                   corev1.HostPathDirectory,
				"/lib/modules":                           corev1.HostPathDirectory,
			}
			seen := 0
			for _, v := range c.pod.Volumes {
				if v.HostPath == nil {
					continue
				}
				seen++
				kind, ok := want[v.HostPath.Path]
				err = errors.Join(err, hold(ok && ptr.Deref(v.HostPath.Type, "") == kind, "%s is not on the list, or of another type", v.HostPath.Path))
			}
			return errors.Join(err, hold(seen == len(want), "%d host paths, want %d", seen, len(want)))
		},
		func(c *cluster) { c.volume("pool").HostPath.Type = ptr.To(corev1.HostPathDirectoryOrCreate) },
	},
	{
		"mounts match volumes",
		func(c *cluster) (err error) {
			used := map[string]bool{}
			for _, container := range c.pod.Containers {
				for _, m := range container.VolumeMounts {
					used[m.Name] = true
					err = errors.Join(err, hold(c.volume(m.Name) != nil, "%s mounts %s, which is not there", container.Name, m.Name))
				}
			}
			for _, v := range c.pod.Volumes {
				err = errors.Join(err, hold(used[v.Name], "nobody mounts %s", v.Name))
			}
			return err
		},
		func(c *cluster) { c.agent.VolumeMounts[0].Name = "plugins" },
	},
	{
		"the pool has its host's path", // the names of backing files are absolute
		func(c *cluster) error {
			m := c.mount(c.agent, "pool")
			return errors.Join(
				hold(m.MountPath == c.volume("pool").HostPath.Path, "it is mounted at %q", m.MountPath),
				hold(flag(c.agent, "pool") == "default="+m.MountPath, "the driver takes %q", flag(c.agent, "pool")),
			)
		},
		func(c *cluster) { c.mount(c.agent, "pool").MountPath = "/pool" },
	},
	{
		"mounts reach the node",
		func(c *cluster) error {
			m := c.mount(c.agent, "kubelet")
			return hold(m.MountPath == c.volume("kubelet").HostPath.Path && ptr.Deref(m.MountPropagation, "") == corev1.MountPropagationBidirectional,
				"kubelet's directory must be at its own path, Bidirectional")
		},
		func(c *cluster) { c.mount(c.agent, "kubelet").MountPropagation = nil },
	},
	{
		"one socket",
		func(c *cluster) (err error) {
			for _, s := range c.sidecars() {
				err = errors.Join(err, hold("unix://"+flag(s, "csi-address") == flag(c.agent, "endpoint"), "%s calls another socket", s.Name),
					hold(c.mount(s, "plugin") != nil, "%s does not see the socket", s.Name))
			}
			return err
		},
		func(c *cluster) { c.sidecars()[0].Args[0] = "--csi-address=/other.sock" },
	},
	{
		"the driver is the first container", // patches of operators count on it
		func(c *cluster) error {
			return hold(c.pod.Containers[0].Name == "driver", "the first is %s", c.pod.Containers[0].Name)
		},
		func(c *cluster) { slices.Reverse(c.pod.Containers) },
	},
	{
		"one holder, in a pod of its own",
		func(c *cluster) error {
			pod := &c.holder.Spec.Template.Spec
			if len(pod.Containers) != 1 || len(pod.Containers[0].VolumeMounts) != 1 || len(pod.Volumes) != 1 {
				return errors.New("the holder has more than one container or volume")
			}
			holder, mount, volume, run := &pod.Containers[0], pod.Containers[0].VolumeMounts[0], pod.Volumes[0], c.mount(c.agent, "run")
			x := holder.SecurityContext
			return errors.Join(
				hold(holder.Image == c.agent.Image, "holder runs %s, the driver %s", holder.Image, c.agent.Image),
				hold(holder.Args[0] == "holder" && flag(holder, "run-dir") == flag(c.agent, "run-dir"), "holder has another run directory"),
				hold(mount.MountPath == run.MountPath && volume.HostPath != nil && volume.HostPath.Path == c.volume("run").HostPath.Path, "holder does not see the run directory"),
				hold(flag(c.agent, "start-holder") == "false", "the driver starts a holder that ends with its container"),
				hold(ptr.Deref(run.MountPropagation, "") == corev1.MountPropagationBidirectional, "FUSE mounts are not seen by the driver's next pod"),
				hold(c.holder.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType, "holder and driver may be replaced at once"),
				hold(x != nil && !ptr.Deref(x.Privileged, false) && !ptr.Deref(x.AllowPrivilegeEscalation, true) && ptr.Deref(x.ReadOnlyRootFilesystem, false) &&
					slices.Equal(x.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(x.Capabilities.Add) == 0, "holder is not confined"),
				hold(!ptr.Deref(pod.AutomountServiceAccountToken, true), "holder gets a token"),
				hold(pod.PriorityClassName == c.pod.PriorityClassName && slices.Equal(pod.Tolerations, c.pod.Tolerations), "holder is not wherever the driver is"))
		},
		func(c *cluster) { c.holder.Spec.UpdateStrategy.Type = appsv1.RollingUpdateDaemonSetStrategyType },
	},
	{
		"tokens only where needed",
		func(c *cluster) error {
			err := hold(!ptr.Deref(c.pod.AutomountServiceAccountToken, true), "every container gets a token")
			needs := []string{"csi-provisioner", "csi-snapshotter", "csi-resizer"}
			for _, container := range c.pod.Containers {
				err = errors.Join(err, hold((c.mount(&container, "token") != nil) == slices.Contains(needs, container.Name), "%s and its token", container.Name))
			}
			return err
		},
		func(c *cluster) {
			c.agent.VolumeMounts = append(c.agent.VolumeMounts, corev1.VolumeMount{Name: "token", MountPath: "/token"})
		},
	},
	{
		"rights are few",
		func(c *cluster) (err error) {
			check := func(name string, rules []rbacv1.PolicyRule) {
				for _, r := range rules {
					for _, word := range slices.Concat(r.Verbs, r.APIGroups, r.Resources) {
						err = errors.Join(err, hold(word != "*" && word != "escalate" && word != "bind" && word != "impersonate", "%s says %q", name, word))
					}
					if slices.Contains(r.Resources, "secrets") {
						err = errors.Join(err, hold(len(r.ResourceNames) > 0 && !slices.ContainsFunc(r.Verbs, func(v string) bool { return v != "get" && v != "update" }),
							"%s may %v Secrets %v", name, r.Verbs, r.ResourceNames))
					}
				}
			}
			for _, r := range all[*rbacv1.ClusterRole](c.objects) {
				check(r.Name, r.Rules)
				err = errors.Join(err, hold(!slices.ContainsFunc(r.Rules, func(p rbacv1.PolicyRule) bool { return slices.Contains(p.Resources, "secrets") }), "%s reads Secrets of all namespaces", r.Name))
			}
			for _, r := range all[*rbacv1.Role](c.objects) {
				check(r.Name, r.Rules)
			}
			return err
		},
		func(c *cluster) {
			r := all[*rbacv1.Role](c.objects)[0]
			r.Rules[0].Verbs = []string{"*"}
		},
	},
	{
		"bindings bind what is there",
		func(c *cluster) (err error) {
			roles := map[string]bool{}
			for _, r := range all[*rbacv1.ClusterRole](c.objects) {
				roles["ClusterRole/"+r.Name] = true
			}
			for _, r := range all[*rbacv1.Role](c.objects) {
				roles["Role/"+r.Name] = true
			}
			accounts := map[string]bool{}
			for _, a := range all[*corev1.ServiceAccount](c.objects) {
				accounts[a.Namespace+"/"+a.Name] = true
			}
			check := func(name string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
				err = errors.Join(err, hold(roles[ref.Kind+"/"+ref.Name], "%s binds %s %s, which is not there", name, ref.Kind, ref.Name))
				for _, s := range subjects {
					err = errors.Join(err, hold(accounts[s.Namespace+"/"+s.Name], "%s binds to %s/%s", name, s.Namespace, s.Name))
				}
			}
			for _, b := range all[*rbacv1.ClusterRoleBinding](c.objects) {
				check(b.Name, b.RoleRef, b.Subjects)
			}
			for _, b := range all[*rbacv1.RoleBinding](c.objects) {
				check(b.Name, b.RoleRef, b.Subjects)
			}
			return errors.Join(err, hold(accounts[c.node.Namespace+"/"+c.pod.ServiceAccountName], "the pod runs as %q", c.pod.ServiceAccountName))
		},
		func(c *cluster) { c.pod.ServiceAccountName = "default" },
	},
	{
		"the namespace is privileged, and ours",
		func(c *cluster) error {
			ns, err := only[*corev1.Namespace](c.objects)
			if err != nil {
				return err
			}
			return errors.Join(
				hold(ns.Labels["pod-security.kubernetes.io/enforce"] == "privileged", "the pod would be refused"),
				hold(c.node.Namespace == ns.Name, "the pod is in %q", c.node.Namespace),
			)
		},
		func(c *cluster) { c.node.Namespace = "default" },
	},
	{
		"the agent outlives its neighbours",
		func(c *cluster) error {
			u := c.node.Spec.UpdateStrategy.RollingUpdate
			r := c.agent.Resources
			_, cpu := r.Limits[corev1.ResourceCPU]
			_, memory := r.Limits[corev1.ResourceMemory]
			return errors.Join(
				hold(c.pod.PriorityClassName == "system-node-critical", "priority"),
				hold(u != nil && u.MaxSurge != nil && u.MaxSurge.IntValue() == 0, "two agents may share a pool during an update"),
				hold(ptr.Deref(c.pod.TerminationGracePeriodSeconds, 0) >= 60, "grace period"),
				hold(slices.ContainsFunc(c.pod.Tolerations, func(t corev1.Toleration) bool { return t.Operator == corev1.TolerationOpExists && t.Key == "" }), "a taint evicts it"),
				hold(!cpu && memory, "a memory limit and no CPU limit"),
			)
		},
		func(c *cluster) { c.node.Spec.UpdateStrategy.RollingUpdate.MaxSurge = nil },
	},
	{
		"liveness is patient and asked of the probe",
		func(c *cluster) error {
			p := c.agent.LivenessProbe
			if p == nil || p.HTTPGet == nil {
				return errors.New("the driver has no HTTP liveness probe")
			}
			port := slices.IndexFunc(c.agent.Ports, func(q corev1.ContainerPort) bool { return q.Name == p.HTTPGet.Port.String() })
			return errors.Join(
				hold(port >= 0 && fmt.Sprint(c.agent.Ports[max(port, 0)].ContainerPort) == flag(c.container("livenessprobe"), "health-port"), "the probe asks another port"),
				hold(p.FailureThreshold*p.PeriodSeconds >= 60, "a restart after less than a minute"),
			)
		},
		func(c *cluster) { c.agent.LivenessProbe.FailureThreshold = 1 },
	},
	{
		"an upgrade waits for an agent that serves",
		func(c *cluster) error {
			ready, live := c.agent.ReadinessProbe, c.agent.LivenessProbe
			return errors.Join(
				hold(ready != nil && ready.HTTPGet != nil && ready.HTTPGet.Path == live.HTTPGet.Path && ready.HTTPGet.Port == live.HTTPGet.Port, "an agent is ready when it is started"),
				hold(c.node.Spec.MinReadySeconds >= 10, "one that ends again and again is ready between"),
			)
		},
		func(c *cluster) { c.agent.ReadinessProbe = nil },
	},
	{
		"images are pinned and name no registry",
		func(c *cluster) (err error) {
			for _, container := range c.pod.Containers {
				name, tag, _ := strings.Cut(container.Image, ":")
				err = errors.Join(err, hold(!strings.Contains(name, "/") && !strings.Contains(name, "."), "%s names a registry", container.Image),
					hold(tag != "" && tag != "latest" || container.Image == c.agent.Image, "%s has no version", container.Image))
			}
			return err
		},
		func(c *cluster) { c.sidecars()[0].Image = "csi-provisioner:latest" },
	},
}

// overlays are the kustomizations that a cluster can have.
var overlays = []string{"overlays/small", "overlays/single-node", "overlays/standard"}

// TestRules holds every rule in every cluster, and shows that each can fail.
func TestRules(t *testing.T) {
	for _, dir := range overlays {
		for _, r := range rules {
			t.Run(dir+"/"+r.name, func(t *testing.T) {
				c := newCluster(t, dir)
				if err := r.check(c); err != nil {
					t.Error(err)
				}
				r.spoil(c)
				if r.check(c) == nil {
					t.Error("the rule does not notice a change that breaks it")
				}
			})
		}
	}
}

// TestResizerOnlyOnSingleNodes: csi-resizer has no node-deployment mode; on
// several nodes each would fail the volumes of the others.
func TestResizerOnlyOnSingleNodes(t *testing.T) {
	if newCluster(t, "overlays/small").container("csi-resizer") != nil {
		t.Error("small has csi-resizer")
	}
	if newCluster(t, "overlays/single-node").container("csi-resizer") == nil {
		t.Error("single-node has no csi-resizer")
	}
}
