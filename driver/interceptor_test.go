package driver

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/go-logr/logr/funcr"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"k8s.io/klog/v2"
)

// TestBusyVolume: while one RPC changes a volume, a second is answered at once.
func TestBusyVolume(t *testing.T) {
	r := newRig(t)
	id := r.volume("v", nil)
	unlock, ok := r.driver.locks.try(id)
	if !ok {
		t.Fatal("the volume is locked")
	}
	wantCode(t, "stage", r.stage(id, mountCap("")), codes.Aborted)
	_, err := r.DeleteVolume(t.Context(), &csi.DeleteVolumeRequest{VolumeId: id})
	wantCode(t, "delete", err, codes.Aborted)
	unlock()
	wantCode(t, "stage", r.stage(id, mountCap("")), codes.OK)
	wantCode(t, "unstage", r.unstage(id), codes.OK)
}

// TestCallerLeaves: the change goes on; a retry is told so, then finds the result.
func TestCallerLeaves(t *testing.T) {
	r := newRig(t)
	begun, proceed := make(chan bool), make(chan bool)
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() { // ends when its caller leaves
		_, err := change(ctx, r.driver, "id", func(ctx context.Context) (int, error) {
			close(begun)
			<-proceed
			return 1, ctx.Err()
		})
		left <- err
	}()
	<-begun
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Fatalf("the caller got %v", err)
	}
	_, err := change(t.Context(), r.driver, "id", func(context.Context) (int, error) { return 2, nil })
	if codeOf(err) != codes.Aborted {
		t.Fatalf("the retry got %v", err)
	}
	close(proceed)
	for {
		got, err := change(t.Context(), r.driver, "id", func(context.Context) (int, error) { return 2, nil })
		if err == nil && got == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

// TestPanic: a bug in one RPC is an answer, and the process goes on.
func TestPanic(t *testing.T) {
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/X"}
	_, err := makeStatus(t.Context(), nil, info, func(ctx context.Context, req any) (any, error) {
		return recoverPanics(ctx, req, info, func(context.Context, any) (any, error) { panic("bug") })
	})
	wantCode(t, "panic", err, codes.Internal)
	r := newRig(t)
	_, err = change(t.Context(), r.driver, "id", func(context.Context) (int, error) { panic("bug") })
	wantCode(t, "panic in a change", toStatus(err), codes.Internal)
	if _, err := change(t.Context(), r.driver, "id", func(context.Context) (int, error) { return 0, nil }); err != nil {
		t.Errorf("after the panic: %v", err)
	}
}

func TestDrain(t *testing.T) {
	r := newRig(t)
	if err := r.driver.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err := r.ListVolumes(t.Context(), &csi.ListVolumesRequest{})
	wantCode(t, "after drain", err, codes.Unavailable)
}

// TestProbesAreBounded: a look that hangs is not waited for and not repeated.
func TestProbesAreBounded(t *testing.T) {
	var p probes
	hang, begun := make(chan bool), make(chan bool)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { // ends the wait, not the look
		<-begun
		cancel()
	}()
	if err := p.run(ctx, "x", func() error { close(begun); <-hang; return nil }); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	look, _ := p.running.Load("x")
	p.running.Store("x", &probe{done: look.(*probe).done}) // it has hung for long by now
	if err := p.run(t.Context(), "x", func() error { return nil }); codeOf(err) != codes.Unavailable {
		t.Fatalf("second look: %v", err)
	}
	if err := p.run(t.Context(), "y", func() error { return nil }); err != nil {
		t.Fatalf("another look: %v", err)
	}
	close(hang)
}

// A waitedFor context tells when somebody waits for its end.
type waitedFor struct {
	context.Context
	waits func()
}

func (c waitedFor) Done() <-chan struct{} {
	c.waits()
	return c.Context.Done()
}

// TestProbesTakeTurns: of two who look at the same thing, both see it.
func TestProbesTakeTurns(t *testing.T) {
	var p probes
	waits, second := make(chan bool), make(chan error, 1)
	err := p.run(t.Context(), "x", func() error {
		go func() { // ends with the second look
			ctx := waitedFor{t.Context(), sync.OnceFunc(func() { close(waits) })}
			second <- p.run(ctx, "x", func() error { return nil })
		}()
		select {
		case <-waits:
			return nil
		case err := <-second:
			return fmt.Errorf("the second does not wait: %w", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// TestSecretsAreNotLogged: neither what CSI calls secret nor the tokens of
// service accounts.
func TestSecretsAreNotLogged(t *testing.T) {
	var logged strings.Builder
	log := funcr.New(func(prefix, args string) { fmt.Fprintln(&logged, prefix, args) }, funcr.Options{Verbosity: 10})
	info := &grpc.UnaryServerInfo{FullMethod: "/csi.v1.Node/X"}
	for _, req := range []any{
		&csi.CreateVolumeRequest{Name: "the name", Secrets: map[string]string{"key": "hush"}},
		&csi.NodePublishVolumeRequest{VolumeId: "the name", Secrets: map[string]string{"key": "hush"},
			VolumeContext: map[string]string{tokensKey: "hush", "other": "kept"}},
		&csi.NodeStageVolumeRequest{VolumeId: "the name", VolumeContext: map[string]string{tokensKey: "hush"}},
	} {
		_, err := LogCalls(klog.NewContext(t.Context(), log), req, info, func(context.Context, any) (any, error) { return nil, errors.New("x") })
		if err == nil {
			t.Error("no error")
		}
	}
	if strings.Contains(logged.String(), "hush") || strings.Count(logged.String(), "the name") != 3 || !strings.Contains(logged.String(), "kept") {
		t.Errorf("logged:\n%s", logged.String())
	}
}
