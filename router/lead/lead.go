package lead

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	"k8s.io/klog/v2"
)

// Options configure Run. All fields without a default are required.
type Options struct {
	Client    kubernetes.Interface
	Namespace string // of the Lease
	Lease     string // its name
	Identity  string // of this replica
	// Tasks are what the leader does, by name.
	Tasks map[string]Task
}

// A Task is repeated while this replica leads.
type Task struct {
	Every time.Duration
	Do    func(context.Context) error
}

// The times of the election: a leader that stalls is replaced after leaseTime,
// and notices itself after renewTime.
const (
	leaseTime = 15 * time.Second
	renewTime = 10 * time.Second
	retryTime = 2 * time.Second
)

// Run takes part in the election and does the tasks while it leads, until ctx
// ends.
func Run(ctx context.Context, o Options) error {
	var working sync.WaitGroup
	defer working.Wait()
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: o.Namespace, Name: o.Lease},
			Client:     o.Client.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: o.Identity},
		},
		LeaseDuration: leaseTime, RenewDeadline: renewTime, RetryPeriod: retryTime,
		ReleaseOnCancel: true,
		Name:            o.Lease,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) {
				working.Add(1)
				defer working.Done()
				klog.FromContext(ctx).Info("leading", "lease", o.Lease, "identity", o.Identity)
				o.work(ctx)
			},
			OnStoppedLeading: func() { klog.FromContext(ctx).Info("not leading", "lease", o.Lease, "identity", o.Identity) },
		},
	})
	if err != nil {
		return fmt.Errorf("lead: %w", err)
	}
	for ctx.Err() == nil {
		elector.Run(ctx) // returns when it has lost the lease
	}
	return nil
}

// work does the tasks until ctx ends.
func (o Options) work(ctx context.Context) {
	var tasks sync.WaitGroup
	for name, task := range o.Tasks {
		tasks.Go(func() { Repeat(ctx, name, task) })
	}
	tasks.Wait()
}

// Repeat does a task until ctx ends, sooner again when it failed.
func Repeat(ctx context.Context, name string, task Task) {
	for {
		wait := task.Every
		if err := task.Do(ctx); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "task failed", "task", name)
			wait = min(wait, retryTime)
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// errNoSecret says what to do about a Secret that nobody here may create.
var errNoSecret = errors.New("apply the manifests of the controller again, which have it")
