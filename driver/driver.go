package driver

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"csi-qcow2/internal/durable"
	"csi-qcow2/internal/panics"
	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// DefaultName is the driver name when Options do not give one.
const DefaultName = "csi-qcow2.dev"

// An Attacher makes devices of images; *nbdexport.Attacher is the one in use.
type Attacher interface {
	Attach(ctx context.Context, b nbdexport.Backend, o nbdexport.DeviceOptions) (nbdexport.Device, error)
	Reattach(ctx context.Context, b nbdexport.Backend, o nbdexport.DeviceOptions) (nbdexport.Device, error)
	Abandon(id string) error
	Stale(ctx context.Context) ([]nbdexport.StaleDevice, error)
}

// Options configure a Driver. All fields without a default are required.
type Options struct {
	Name       string                  // of the driver, default DefaultName
	Version    string                  // of this program
	NodeID     string                  // at most 256 bytes; also the topology segment of this node
	MaxVolumes int64                   // that can be staged at once; 0 leaves it to the CO
	Pools      map[string]*volume.Pool // by the name that StorageClasses use
	Attacher   Attacher
	Host       Host
	RunDir     string // for hints; must exist and belong to this process
	// CacheID names the cache of the pools. It stays the same for the next process if that
	// finds there all that this one has not written to the images.
	CacheID string
	// Warnings, of how this process runs, are shown by NodeGetStorageHealth.
	Warnings []string
}

// driverName is a domain name as CSI wants it: at most 63 bytes.
var driverName = regexp.MustCompile(`^[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?$`)

// ValidName reports whether name can be the name of a CSI driver.
func ValidName(name string) bool { return driverName.MatchString(name) }

func (o Options) validate() error {
	var errs []error
	if !ValidName(o.Name) {
		errs = append(errs, fmt.Errorf("driver name %q: want a domain name of at most 63 characters", o.Name))
	}
	if o.NodeID == "" || len(o.NodeID) > maxNodeIDBytes {
		errs = append(errs, fmt.Errorf("node ID %q: want 1 to %d bytes", o.NodeID, maxNodeIDBytes))
	}
	if len(o.Pools) == 0 {
		errs = append(errs, errors.New("no pool"))
	}
	if o.MaxVolumes < 0 {
		errs = append(errs, fmt.Errorf("max volumes %d is negative", o.MaxVolumes))
	}
	return errors.Join(errs...)
}

// A Driver serves CSI for one node.
type Driver struct {
	opts   Options
	pools  pools
	runDir *durable.Dir
	locks  keyLock
	calls  calls
	probes probes
	work   sync.WaitGroup // detached changes

	thawMu  sync.Mutex      // held over the removal of a record of freezing
	thawing map[string]bool // volumes that are thawed in the background, by ID; guarded by thawMu

	metrics *metrics
	meters  sync.Map // *meter.Meter of staged volumes, by volume ID
	usages  sync.Map // qcow2.Usage of staged volumes, by volume ID; see SampleUsage

	returning []returning // until Restore

	mu     sync.Mutex
	staged map[string]*stagedVolume // by volume ID; guarded by mu
}

// New returns a Driver that knows what a predecessor with the same run
// directory had staged. Restore goes on with it.
func New(ctx context.Context, o Options) (*Driver, error) {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if err := o.validate(); err != nil {
		return nil, fmt.Errorf("driver: %w", err)
	}
	pools, err := newPools(o.Pools)
	if err != nil {
		return nil, fmt.Errorf("driver: %w", err)
	}
	dir, err := durable.OpenDir(o.RunDir)
	if err != nil {
		return nil, fmt.Errorf("driver: run directory: %w", err)
	}
	d := &Driver{opts: o, pools: pools, runDir: dir, staged: make(map[string]*stagedVolume), thawing: make(map[string]bool), metrics: newMetrics()}
	if err := d.recall(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("driver: %w", err), dir.Close())
	}
	return d, nil
}

// Register adds the CSI services to a server made with ServerOptions.
func (d *Driver) Register(s *grpc.Server) {
	d.RegisterController(s)
	csi.RegisterNodeServer(s, nodeServer{Driver: d})
	d.registerOperator(s)
}

// RegisterController adds the services that a CO calls from anywhere.
func (d *Driver) RegisterController(s *grpc.Server) {
	csi.RegisterIdentityServer(s, identityServer{Driver: d})
	csi.RegisterControllerServer(s, controllerServer{Driver: d})
	csi.RegisterGroupControllerServer(s, groupServer{Driver: d})
	csi.RegisterSnapshotMetadataServer(s, metadataServer{Driver: d})
}

// ServerOptions are what the gRPC server of Register needs.
func (d *Driver) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{d.interceptors(), d.streamInterceptor()}
}

// Drain refuses new RPCs with UNAVAILABLE and waits for those under way, and
// for the changes whose caller has left, as long as ctx allows.
func (d *Driver) Drain(ctx context.Context) error {
	d.calls.drain()
	done := make(chan struct{})
	go func() { // ends with the last RPC and change
		d.calls.running.Wait()
		d.work.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("driver: drain: %w", ctx.Err())
	}
}

// Close flushes and lets go of the staged volumes. The kernel keeps their nbd devices for the
// next process, see Restore.
func (d *Driver) Close() error {
	d.mu.Lock()
	staged := d.staged
	d.staged = make(map[string]*stagedVolume)
	d.mu.Unlock()
	for _, r := range d.returning { // Restore was not called
		r.unlock()
	}
	var workers sync.WaitGroup
	var mu sync.Mutex
	var errs []error // guarded by mu
	for _, v := range staged {
		workers.Go(func() {
			err := d.leave(v)
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	workers.Wait()
	return errors.Join(append(errs, d.runDir.Close())...)
}

// change runs fn with the lock of the volume id. It goes on when its caller
// leaves; a retry gets volume.ErrBusy until it has ended.
func change[T any](ctx context.Context, d *Driver, id string, fn func(context.Context) (T, error)) (T, error) {
	var none T
	unlock, ok := d.locks.try(id)
	if !ok {
		return none, fmt.Errorf("%w on %s", volume.ErrBusy, id)
	}
	done := make(chan outcome[T], 1)
	d.work.Add(1)
	go func() { // ends when fn does; Drain waits for it
		defer d.work.Done()
		value, err := panics.Catch(func() (T, error) { return fn(context.WithoutCancel(ctx)) })
		unlock()
		if ctx.Err() != nil { // nobody may be there to hear of it
			logPanic(ctx, err)
		}
		done <- outcome[T]{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		return none, ctx.Err()
	}
}

type outcome[T any] struct {
	value T
	err   error
}

// A keyLock is a set of locks by name that never waits.
type keyLock struct{ held sync.Map }

func (l *keyLock) try(key string) (unlock func(), ok bool) {
	if _, busy := l.held.LoadOrStore(key, true); busy {
		return nil, false
	}
	return func() { l.held.Delete(key) }, true
}
