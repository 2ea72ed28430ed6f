package check

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	groupv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumegroupsnapshot/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/utils/ptr"
)

// A standard is the standard shape: a cluster with a controller.
type standard struct {
	*cluster
	controller *appsv1.Deployment
	pod        *corev1.PodSpec // of controller
}

func newStandard(t *testing.T) *standard {
	t.Helper()
	c := newCluster(t, "overlays/standard")
	controller, err := only[*appsv1.Deployment](c.objects)
	if err != nil {
		t.Fatal(err)
	}
	return &standard{c, controller, &controller.Spec.Template.Spec}
}

// central returns a container of the controller, nil when there is none.
func (s *standard) central(name string) *corev1.Container {
	for i := range s.pod.Containers {
		if s.pod.Containers[i].Name == name {
			return &s.pod.Containers[i]
		}
	}
	return nil
}

// leaders returns the sidecars of which one replica leads.
func (s *standard) leaders() []*corev1.Container {
	return []*corev1.Container{s.central("csi-provisioner"), s.central("csi-resizer"), s.central("csi-snapshotter")}
}

// The rules of the standard shape, beyond those of every cluster.
var standardRules = []struct {
	name  string
	check func(s *standard) error
	spoil func(s *standard)
}{
	{
		"the controller has no power over its node",
		func(s *standard) (err error) {
			x := s.pod.SecurityContext
			err = errors.Join(
				hold(!s.pod.HostNetwork && !s.pod.HostPID && !s.pod.HostIPC, "it shares a namespace with the host"),
				hold(ptr.Deref(x.RunAsNonRoot, false) && ptr.Deref(x.RunAsUser, 0) != 0, "it runs as root"),
				hold(x.SeccompProfile != nil && x.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault, "seccomp"),
			)
			for _, v := range s.pod.Volumes {
				err = errors.Join(err, hold(v.HostPath == nil, "volume %s is the host's", v.Name))
			}
			for _, c := range s.pod.Containers {
				y := c.SecurityContext
				err = errors.Join(err, hold(y != nil && !ptr.Deref(y.Privileged, false) && !ptr.Deref(y.AllowPrivilegeEscalation, true) &&
					ptr.Deref(y.ReadOnlyRootFilesystem, false) && slices.Equal(y.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(y.Capabilities.Add) == 0,
					"%s is not confined", c.Name))
			}
			return err
		},
		func(s *standard) { s.pod.Volumes[0].HostPath = &corev1.HostPathVolumeSource{Path: "/"} },
	},
	{
		"one replica may go",
		func(s *standard) error {
			budget, err := only[*policyv1.PodDisruptionBudget](s.objects)
			if err != nil {
				return err
			}
			return errors.Join(
				hold(ptr.Deref(s.controller.Spec.Replicas, 1) >= 2, "there is one only"),
				hold(maps.Equal(budget.Spec.Selector.MatchLabels, s.controller.Spec.Selector.MatchLabels), "the budget is of other pods"),
				hold(budget.Spec.MaxUnavailable.IntValue() == 1, "the budget"),
				hold(s.pod.PriorityClassName == "system-cluster-critical", "priority"),
			)
		},
		func(s *standard) { s.controller.Spec.Replicas = ptr.To[int32](1) },
	},
	{
		"sidecars lead, and call the router beside them",
		func(s *standard) (err error) {
			for _, c := range s.leaders() {
				if c == nil {
					return errors.New("a sidecar is missing")
				}
				err = errors.Join(err,
					hold(slices.Contains(c.Args, "--leader-election") && !slices.Contains(c.Args, "--node-deployment"), "%s does not lead", c.Name),
					hold("unix://"+flag(c, "csi-address") == flag(s.central("driver"), "endpoint"), "%s calls another socket", c.Name))
			}
			return err
		},
		func(s *standard) { s.central("csi-resizer").Args[1] = "--node-deployment" },
	},
	{
		"a restore may choose its node",
		func(s *standard) error {
			p := s.central("csi-provisioner")
			return errors.Join(
				hold(!slices.Contains(p.Args, "--strict-topology"), "it must be on the node of its pod's first choice"),
				hold(slices.Contains(p.Args, "--enable-capacity"), "no capacity is published"),
				hold(flag(p, "capacity-ownerref-level") == "2", "capacity is not owned by the Deployment"),
			)
		},
		func(s *standard) {
			s.central("csi-provisioner").Args = append(s.central("csi-provisioner").Args, "--strict-topology")
		},
	},
	{
		"a snapshot does not wait long for a claim that was given up",
		func(s *standard) error {
			every, err := time.ParseDuration(flag(s.central("csi-provisioner"), "snapshot-orphan-sweep-interval"))
			return errors.Join(err, hold(every > 0 && every <= time.Minute, "it waits for %s", every))
		},
		func(s *standard) {
			args := &s.central("csi-provisioner").Args
			*args = slices.DeleteFunc(*args, func(a string) bool { return strings.HasPrefix(a, "--snapshot-orphan-sweep-interval") })
		},
	},
	{
		"tokens where needed",
		func(s *standard) error {
			err := hold(!ptr.Deref(s.pod.AutomountServiceAccountToken, true), "every container gets a token")
			for _, c := range s.pod.Containers {
				err = errors.Join(err, hold((s.mount(&c, "token") != nil) == (c.Name != "livenessprobe"), "%s and its token", c.Name))
			}
			return err
		},
		func(s *standard) { s.pod.AutomountServiceAccountToken = nil },
	},
	{
		"nodes need no token",
		func(s *standard) (err error) {
			for _, b := range all[*rbacv1.ClusterRoleBinding](s.objects) {
				err = errors.Join(err, hold(b.Subjects[0].Name != s.cluster.pod.ServiceAccountName, "%s gives the nodes rights", b.Name))
			}
			for _, b := range all[*rbacv1.RoleBinding](s.objects) {
				err = errors.Join(err, hold(b.Subjects[0].Name != s.cluster.pod.ServiceAccountName, "%s gives the nodes rights", b.Name))
			}
			return err
		},
		func(s *standard) {
			all[*rbacv1.RoleBinding](s.objects)[0].Subjects[0].Name = s.cluster.pod.ServiceAccountName
		},
	},
	{
		"certificates have their places",
		func(s *standard) (err error) {
			driver := s.central("driver")
			names := []string{flag(driver, "ca-secret"), flag(driver, "node-secret")}
			found := map[string]bool{}
			for _, secret := range all[*corev1.Secret](s.objects) {
				found[secret.Name] = true
				err = errors.Join(err, hold(len(secret.Data)+len(secret.StringData) == 0, "applying %s would undo its renewal", secret.Name))
			}
			for _, r := range all[*rbacv1.Role](s.objects) {
				for _, rule := range r.Rules {
					if slices.Contains(rule.Resources, "secrets") {
						err = errors.Join(err, hold(slices.Equal(rule.ResourceNames, names), "%s is about Secrets %v", r.Name, rule.ResourceNames))
					}
				}
			}
			tls := s.volume("tls")
			mount := s.mount(s.agent, "tls")
			return errors.Join(err,
				hold(found[names[0]] && found[names[1]] && len(found) == 2, "the Secrets are %v", found),
				hold(tls.Secret.SecretName == names[1], "agents mount %s: only the controller knows the CA's key", tls.Secret.SecretName),
				hold(ptr.Deref(tls.Secret.Optional, false), "agents would wait for the controller"),
				hold(mount.MountPath == flag(s.agent, "tls-dir") && mount.ReadOnly && mount.SubPath == "", "a renewed certificate does not reach the agents"),
			)
		},
		func(s *standard) { s.volume("tls").Secret.SecretName = "csi-qcow2-ca" },
	},
	{
		"the controller reaches the agents, and nobody else does",
		func(s *standard) error {
			driver := s.central("driver")
			port := flag(driver, "node-port")
			listens := slices.IndexFunc(s.agent.Ports, func(p corev1.ContainerPort) bool { return p.Name == "controller" })
			err := errors.Join(
				hold(flag(s.agent, "remote-address") == ":"+port, "the agents listen on %q", flag(s.agent, "remote-address")),
				hold(listens >= 0 && fmt.Sprint(s.agent.Ports[max(listens, 0)].ContainerPort) == port, "the port is not declared"),
			)
			closed := map[string]bool{}
			for _, p := range all[*networkingv1.NetworkPolicy](s.objects) {
				closed[p.Spec.PodSelector.MatchLabels["app.kubernetes.io/component"]] = true
				for _, rule := range p.Spec.Ingress {
					err = errors.Join(err,
						hold(len(rule.From) == 1 && rule.From[0].PodSelector != nil && maps.Equal(rule.From[0].PodSelector.MatchLabels, s.controller.Spec.Selector.MatchLabels), "%s lets others in", p.Name),
						hold(len(rule.Ports) == 1 && rule.Ports[0].Port.String() == port, "%s opens other ports", p.Name))
				}
			}
			return errors.Join(err, hold(closed["node"] && closed["controller"], "closed are %v", closed))
		},
		func(s *standard) { s.agent.Args[len(s.agent.Args)-2] = "--remote-address=:9999" },
	},
	{
		"the router finds the agents",
		func(s *standard) error {
			labels := s.node.Spec.Template.Labels
			return hold(labels["app.kubernetes.io/name"] == "csi-qcow2" && labels["app.kubernetes.io/component"] == "node" && flag(s.central("driver"), "node-selector") == "",
				"agents are labelled %v", labels)
		},
		func(s *standard) { s.node.Spec.Template.Labels["app.kubernetes.io/component"] = "agent" },
	},
	{
		"both agents and controller have the same driver",
		func(s *standard) error {
			return hold(s.central("driver").Image == s.agent.Image, "%q and %q", s.central("driver").Image, s.agent.Image)
		},
		func(s *standard) { s.agent.Image += "-old" },
	},
	{
		"groups have a class",
		func(s *standard) error {
			class, err := only[*groupv1.VolumeGroupSnapshotClass](s.objects)
			if err != nil {
				return err
			}
			return hold(class.Driver == s.driver.Name, "it is of %q", class.Driver)
		},
		func(s *standard) {
			all[*groupv1.VolumeGroupSnapshotClass](s.objects)[0].Driver = "other.dev"
		},
	},
	{
		"groups have a sidecar",
		func(s *standard) error {
			gates := flag(s.central("csi-snapshotter"), "feature-gates")
			return hold(gates == "CSIVolumeGroupSnapshot=true", "its feature gates are %q", gates)
		},
		func(s *standard) {
			args := &s.central("csi-snapshotter").Args
			*args = slices.DeleteFunc(*args, func(a string) bool { return strings.HasPrefix(a, "--feature-gates") })
		},
	},
	{
		"the start-up taint does not keep its remover away",
		func(s *standard) error {
			return hold(slices.ContainsFunc(s.pod.Tolerations, func(t corev1.Toleration) bool {
				return t.Key == s.driver.Name+"/agent-not-ready" && t.Operator == corev1.TolerationOpExists
			}), "it does")
		},
		func(s *standard) { s.pod.Tolerations = nil },
	},
	{
		"images of the controller are pinned and name no registry",
		func(s *standard) (err error) {
			for _, c := range s.pod.Containers {
				name, tag, _ := strings.Cut(c.Image, ":")
				err = errors.Join(err, hold(!strings.ContainsAny(name, "/."), "%s names a registry", c.Image),
					hold(tag != "" && tag != "latest" || c.Name == "driver", "%s has no version", c.Image))
			}
			return err
		},
		func(s *standard) { s.central("csi-provisioner").Image = "csi-provisioner" },
	},
}

// TestStandard holds the rules of the standard shape, and shows that each can fail.
func TestStandard(t *testing.T) {
	for _, r := range standardRules {
		t.Run(r.name, func(t *testing.T) {
			s := newStandard(t)
			if err := r.check(s); err != nil {
				t.Error(err)
			}
			r.spoil(s)
			if r.check(s) == nil {
				t.Error("the rule does not notice a change that breaks it")
			}
		})
	}
}
