package driver

import (
	"context"
	"errors"
	"fmt"
	"path"
	"sync"
	"time"

	"github.com/kubernetes-csi/csi-lib-utils/protosanitizer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/panics"
)

// The interceptors of every RPC, outermost first: count and log see the status
// that leaves, toStatus sees every error, recover turns a panic into one.
func (d *Driver) interceptors() grpc.ServerOption {
	return grpc.ChainUnaryInterceptor(d.metrics.count, LogCalls, makeStatus, d.calls.admit, recoverPanics, checkLimits)
}

// LogCalls logs each RPC with its secrets stripped, and its result.
func LogCalls(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	log := klog.FromContext(ctx).WithValues("method", path.Base(info.FullMethod))
	log.V(4).Info("call", "request", loggable(req))
	begin := time.Now()
	resp, err := handler(klog.NewContext(ctx, log), req)
	took := time.Since(begin).Round(time.Microsecond)
	if err != nil {
		log.Error(err, "call failed", "code", status.Code(err).String(), "took", took)
	} else {
		log.V(4).Info("reply", "response", protosanitizer.StripSecrets(resp), "took", took)
	}
	return resp, err
}

// tokensKey is where Kubernetes passes service account tokens to drivers that
// ask for them; the specification does not count it as a secret.
const tokensKey = "csi.storage.k8s.io/serviceAccount.tokens"

// loggable returns what of req may be logged.
func loggable(req any) any {
	if r, ok := req.(interface{ GetVolumeContext() map[string]string }); ok {
		if _, given := r.GetVolumeContext()[tokensKey]; given {
			req = proto.Clone(req.(proto.Message))
			req.(interface{ GetVolumeContext() map[string]string }).GetVolumeContext()[tokensKey] = "***stripped***"
		}
	}
	return protosanitizer.StripSecrets(req)
}

// makeStatus applies the code table.
func makeStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	if err != nil {
		logPanic(ctx, err)
		return nil, toStatus(err)
	}
	return resp, nil
}

// recoverPanics keeps a bug in the handler of one RPC from ending the devices of all
// volumes; change does the same for its goroutine, and package volume for the opening
// of images. A bug in what changes a pool ends the process: see volume.Pool.
func recoverPanics(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	return panics.Catch(func() (any, error) { return handler(ctx, req) })
}

// logPanic says where a panic was, if err is one that was caught.
func logPanic(ctx context.Context, err error) {
	if p := (*panics.Error)(nil); errors.As(err, &p) {
		klog.FromContext(ctx).Error(nil, "panic", "value", p.Value, "stack", p.Stack)
	}
}

// calls counts the RPCs under way and refuses new ones while draining.
type calls struct {
	mu       sync.Mutex
	draining bool // guarded by mu
	running  sync.WaitGroup
}

func (c *calls) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	c.mu.Lock()
	if c.draining {
		c.mu.Unlock()
		return nil, fmt.Errorf("%w: the node process is stopping", errUnavailable)
	}
	c.running.Add(1)
	c.mu.Unlock()
	defer c.running.Done()
	return handler(ctx, req)
}

// drain refuses new RPCs from now on.
func (c *calls) drain() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining = true
}
