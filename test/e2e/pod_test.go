package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/remotecommand"
)

// Where pods see their volumes.
const (
	mountPath  = "/data"
	devicePath = "/dev/xvda"
)

// A podOption changes a pod before it is made.
type podOption func(*corev1.Pod)

// withClaim mounts a claim at mountPath, or gives it as devicePath.
func (s *space) withClaim(name string) podOption {
	mode := s.getClaim(name).Spec.VolumeMode
	source := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}
	if mode != nil && *mode == corev1.PersistentVolumeBlock {
		return func(p *corev1.Pod) {
			p.Spec.Volumes = []corev1.Volume{{Name: "volume", VolumeSource: source}}
			p.Spec.Containers[0].VolumeDevices = []corev1.VolumeDevice{{Name: "volume", DevicePath: devicePath}}
		}
	}
	return withVolume(source)
}

// withVolume mounts any volume at mountPath.
func withVolume(source corev1.VolumeSource) podOption {
	return func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "volume", VolumeSource: source}}
		p.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "volume", MountPath: mountPath}}
	}
}

func readOnly(p *corev1.Pod) {
	if c := p.Spec.Volumes[0].PersistentVolumeClaim; c != nil {
		c.ReadOnly = true
	}
}

// command replaces what the pod runs, which is nothing.
func command(script string) podOption {
	return func(p *corev1.Pod) { p.Spec.Containers[0].Command = []string{"sh", "-c", script} }
}

// submit makes a pod that waits to be told what to do.
func (s *space) submit(name string, options ...podOption) {
	s.t.Helper()
	grace := int64(1) // with 0 the pod would be gone before its processes are
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "shell", Image: image, Command: []string{"sh", "-c", "while :; do sleep 3600; done"},
			}},
		},
	}
	for _, o := range options {
		o(p)
	}
	if _, err := client.CoreV1().Pods(s.name).Create(s.t.Context(), p, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// start makes a pod and waits until it runs.
func (s *space) start(name string, options ...podOption) {
	s.t.Helper()
	s.submit(name, options...)
	s.running(name)
}

// running waits until the pod is ready.
func (s *space) running(name string) {
	s.t.Helper()
	eventually(s.t, "pod "+name, func(ctx context.Context) error {
		p, err := client.CoreV1().Pods(s.name).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !podReady(p) {
			return fmt.Errorf("pod is %s: %+v", p.Status.Phase, p.Status.Conditions)
		}
		return nil
	})
}

func podReady(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// stop deletes a pod and waits until it is gone.
func (s *space) stop(name string) {
	s.t.Helper()
	if err := client.CoreV1().Pods(s.name).Delete(s.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "end of pod "+name, func(ctx context.Context) error {
		_, err := client.CoreV1().Pods(s.name).Get(ctx, name, metav1.GetOptions{})
		return wantGone(err)
	})
}

// restarts returns how often the pod's container was started again.
func (s *space) restarts(name string) int32 {
	s.t.Helper()
	p, err := client.CoreV1().Pods(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	if len(p.Status.ContainerStatuses) != 1 {
		s.t.Fatalf("pod %s has %d container statuses, want 1", name, len(p.Status.ContainerStatuses))
	}
	return p.Status.ContainerStatuses[0].RestartCount
}

// uid returns the pod's UID, which its processes' control groups have in their names.
func (s *space) uid(name string) string {
	s.t.Helper()
	p, err := client.CoreV1().Pods(s.name).Get(s.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return string(p.UID)
}

// lastLine returns the number on the last line of the pod's output.
func (s *space) lastLine(ctx context.Context, pod string) (int64, error) {
	one := int64(1)
	out, err := client.CoreV1().Pods(s.name).GetLogs(pod, &corev1.PodLogOptions{TailLines: &one}).DoRaw(ctx)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
}

// sh runs a script in a pod and returns what it printed.
func (s *space) sh(pod, script string) string {
	s.t.Helper()
	out, err := s.try(pod, script)
	if err != nil {
		s.t.Fatalf("%s: %s: %v: %s", pod, script, err, out)
	}
	return out
}

// try is sh for scripts that may fail; it returns both outputs then.
func (s *space) try(pod, script string) (string, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), deadline)
	defer cancel()
	request := client.CoreV1().RESTClient().Post().Resource("pods").Namespace(s.name).Name(pod).SubResource("exec").
		VersionedParams(&corev1.PodExecOptions{Command: []string{"sh", "-c", script}, Stdout: true, Stderr: true}, scheme.ParameterCodec)
	executor, err := remotecommand.NewWebSocketExecutor(config, "GET", request.URL().String())
	if err != nil {
		return "", err
	}
	var out, both syncBuffer
	err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: tee{&out, &both}, Stderr: &both})
	if err != nil {
		return both.String(), err
	}
	return strings.TrimSpace(out.String()), nil
}

// refused fails unless the script fails with this text.
func (s *space) refused(pod, script, text string) {
	s.t.Helper()
	out, err := s.try(pod, script)
	if err == nil {
		s.t.Fatalf("%s: %s succeeded, want %q", pod, script, text)
	}
	if !containsFold(out, text) {
		s.t.Fatalf("%s: %s: %v: %s: want %q", pod, script, err, out, text)
	}
}

// write fills a file with megabytes of noise, syncs it and returns its sum.
func (s *space) write(pod, file string, megabytes int) string {
	s.t.Helper()
	return s.sh(pod, fmt.Sprintf("dd if=/dev/urandom of=%s bs=1M count=%d conv=notrunc,fsync 2>/dev/null && %s", file, megabytes, sumOf(file, megabytes)))
}

// sum returns the sum of the first megabytes of a file or device.
func (s *space) sum(pod, file string, megabytes int) string {
	s.t.Helper()
	return s.sh(pod, sumOf(file, megabytes))
}

func sumOf(file string, megabytes int) string {
	return fmt.Sprintf("dd if=%s bs=1M count=%d 2>/dev/null | sha256sum", file, megabytes)
}

// filesystemBytes returns the size of the filesystem at mountPath.
func (s *space) filesystemBytes(pod string) int64 {
	s.t.Helper()
	return s.number(pod, "df -Pk "+mountPath+" | awk 'NR == 2 { printf \"%d\", $2 * 1024 }'")
}

// deviceBytes returns the size of the device at devicePath.
func (s *space) deviceBytes(pod string) int64 {
	s.t.Helper()
	return s.number(pod, "blockdev --getsize64 "+devicePath)
}

// number runs a script that prints one.
func (s *space) number(pod, script string) int64 {
	s.t.Helper()
	n, err := strconv.ParseInt(s.sh(pod, script), 10, 64)
	if err != nil {
		s.t.Fatalf("%s: %s: %v", pod, script, err)
	}
	return n
}

// want fails unless got is want.
func (s *space) want(what, got, want string) {
	s.t.Helper()
	if got != want {
		s.t.Fatalf("%s: got %q, want %q", what, got, want)
	}
}

func containsFold(text, part string) bool {
	return strings.Contains(strings.ToLower(text), strings.ToLower(part))
}

// A syncBuffer takes the two outputs of a command, which arrive side by side.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// tee writes to both.
type tee [2]*syncBuffer

func (t tee) Write(p []byte) (int, error) {
	n, err := t[0].Write(p)
	_, err2 := t[1].Write(p)
	return n, errors.Join(err, err2)
}
