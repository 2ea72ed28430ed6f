package driver

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"k8s.io/klog/v2"

	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// A kernel is the state of a machine that outlives a driver: mounts, devices,
// and which filesystem a volume holds.
type kernel struct {
	mu      sync.Mutex
	mounts  map[string][]fakeMount // by target; guarded by mu
	devices map[string]*fakeDevice // by path; guarded by mu
	content map[string]string      // filesystem by volume ID; guarded by mu
	formats map[string]int         // how often a volume was formatted; guarded by mu
	next    uint64                 // device number; guarded by mu
	steps   int                    // changes seen; guarded by mu
	killAt  int                    // changes after which the process is dead; -1 never; guarded by mu

	frozen    map[string]uint64 // device by mount point; guarded by mu
	freezes   []string          // mount points that were frozen; guarded by mu
	freezeErr error             // what Freeze returns
	thawErr   error             // what Thaw returns, after it has thawed
	leftErr   error             // what ThawLeft returns

	readEnds error // what ReadEnds returns
	unheld   error // what Survives returns of devices
	grows    bool
}

type fakeMount struct {
	Mount
	device string // bound device node, for block
}

func newKernel() *kernel {
	return &kernel{mounts: make(map[string][]fakeMount), devices: make(map[string]*fakeDevice),
		content: make(map[string]string), formats: make(map[string]int), frozen: make(map[string]uint64), killAt: -1, grows: true}
}

func TestMain(m *testing.M) {
	flags := flag.NewFlagSet("klog", flag.PanicOnError)
	klog.InitFlags(flags)
	flags.Parse([]string{"-logtostderr=false", "-stderrthreshold=FATAL"})
	klog.SetOutput(io.Discard)
	os.Exit(m.Run())
}

var errKilled = errors.New("killed")

// step counts a change; a dead process changes nothing any more.
func (k *kernel) step(string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.stepLocked()
}

func (k *kernel) stepLocked() error {
	if k.killAt >= 0 && k.steps >= k.killAt {
		k.steps++
		return errKilled
	}
	k.steps++
	return nil
}

// arm makes the n-th change from now on the last; -1 never.
func (k *kernel) arm(n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.steps, k.killAt = 0, n
}

// died reports whether the armed kill has come.
func (k *kernel) died() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.killAt >= 0 && k.steps > k.killAt
}

// A fakeDevice is a device of this kernel; it is dead when its server is.
type fakeDevice struct {
	k       *kernel
	id      string // DeviceOptions.ID
	path    string
	number  uint64
	size    int64
	backend nbdexport.Backend
	ro      bool
	dead    bool // guarded by k.mu
	held    bool // somebody has it open; guarded by k.mu
}

func (d *fakeDevice) volume() string {
	id, _, _ := strings.Cut(d.id, ".")
	return id
}

func (d *fakeDevice) Path() string { return d.path }
func (d *fakeDevice) Kind() string { return nbdexport.KindFUSE }
func (d *fakeDevice) Size() int64  { return d.size }

func (d *fakeDevice) Resize(_ context.Context, size int64) error {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if err := d.k.stepLocked(); err != nil {
		return err
	}
	d.size = size
	return nil
}

func (d *fakeDevice) Detach(context.Context) error {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if err := d.k.stepLocked(); err != nil {
		return err
	}
	if d.k.usedLocked(d) {
		return nbdexport.ErrDeviceBusy
	}
	delete(d.k.devices, d.path)
	return nil
}

func (k *kernel) usedLocked(d *fakeDevice) bool {
	for _, mounts := range k.mounts {
		for _, m := range mounts {
			if m.Device == d.number || m.device == d.path {
				return true
			}
		}
	}
	return d.held
}

func (d *fakeDevice) Leave() {}

func (d *fakeDevice) Survives() error { return d.k.unheld }

func (d *fakeDevice) Health() error {
	d.k.mu.Lock()
	defer d.k.mu.Unlock()
	if d.dead {
		return nbdexport.ErrDeviceDead
	}
	return nil
}

// A fakeAttacher is one process's.
type fakeAttacher struct{ *kernel }

func (k fakeAttacher) Attach(_ context.Context, b nbdexport.Backend, o nbdexport.DeviceOptions) (nbdexport.Device, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.stepLocked(); err != nil {
		return nil, err
	}
	k.next++
	d := &fakeDevice{k: k.kernel, id: o.ID, path: fmt.Sprintf("/dev/fake%d", k.next), number: k.next, size: b.Size(), backend: b, ro: o.ReadOnly}
	k.devices[d.path] = d
	return d, k.stepLocked()
}

// Abandon leaves the device as it is: the kernel goes on holding an nbd device,
// until somebody stages the volume again.
func (k fakeAttacher) Abandon(string) error { return nil }

// Reattach finds the device of a predecessor that the kernel has kept.
func (k fakeAttacher) Reattach(_ context.Context, b nbdexport.Backend, o nbdexport.DeviceOptions) (nbdexport.Device, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.devices {
		if d.id != o.ID || d.dead {
			continue
		}
		if err := k.stepLocked(); err != nil {
			return nil, err
		}
		d.backend = b
		return d, k.stepLocked()
	}
	return nil, nbdexport.ErrDeviceGone
}

func (k fakeAttacher) Stale(context.Context) ([]nbdexport.StaleDevice, error) {
	// A StaleDevice cannot be made outside its package; cleaning is the kernel's
	// own here, and what is still used stays.
	k.mu.Lock()
	defer k.mu.Unlock()
	for path, d := range k.devices {
		if d.dead && !k.usedLocked(d) {
			delete(k.devices, path)
		}
	}
	return nil, nil
}

// A fakeHost is one process's view of a kernel.
type fakeHost struct{ *kernel }

func (k fakeHost) Mounts(target string) ([]Mount, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var mounts []Mount
	for _, m := range k.mounts[target] {
		mounts = append(mounts, m.Mount)
	}
	return mounts, nil
}

func (k fakeHost) Mount(source, target, fstype string, options []string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.stepLocked(); err != nil {
		return err
	}
	readOnly := slices.Contains(options, "ro")
	dev := k.devices[source]
	switch {
	case fstype != "" && (dev == nil || dev.dead):
		return unix.EIO
	case fstype != "" && k.content[dev.volume()] != fstype:
		return fmt.Errorf("wrong fs type: want %s, the volume has %q", fstype, k.content[dev.volume()])
	case fstype != "":
		k.mounts[target] = append(k.mounts[target], fakeMount{Mount: Mount{Device: dev.number, Type: fstype, ReadOnly: readOnly}})
	case dev != nil:
		k.mounts[target] = append(k.mounts[target], fakeMount{Mount: Mount{Device: 1 << 20, Type: "devtmpfs"}, device: source})
	default:
		from := k.mounts[source]
		if len(from) == 0 {
			return unix.EINVAL
		}
		m := from[len(from)-1]
		if readOnly { // as mount(8) does it: bind, then remount
			k.mounts[target] = append(k.mounts[target], m)
			if err := k.stepLocked(); err != nil {
				return err
			}
			k.mounts[target] = k.mounts[target][:len(k.mounts[target])-1]
			m.ReadOnly = true
		}
		k.mounts[target] = append(k.mounts[target], m)
	}
	return k.stepLocked()
}

func (k fakeHost) Unmount(target string, _ bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.stepLocked(); err != nil {
		return err
	}
	mounts := k.mounts[target]
	if len(mounts) == 0 {
		return unix.EINVAL
	}
	k.mounts[target] = mounts[:len(mounts)-1]
	return k.stepLocked()
}

// Format writes to the volume, so that an interrupted one leaves clusters.
func (k fakeHost) Format(_ context.Context, fstype, device string, _ bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.stepLocked(); err != nil {
		return err
	}
	d := k.devices[device]
	if _, err := d.backend.WriteAt(make([]byte, 4096), 0); err != nil {
		return err
	}
	k.formats[d.volume()]++
	k.content[d.volume()] = "half of " + fstype
	if err := k.stepLocked(); err != nil {
		return err
	}
	k.content[d.volume()] = fstype
	return k.stepLocked()
}

func (k fakeHost) Check(_ context.Context, _, device string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.devices[device]; d == nil || d.dead {
		return unix.EIO
	}
	return k.stepLocked()
}

func (k fakeHost) GrowsMounted(string) bool { return k.grows }

func (k fakeHost) Grow(_ context.Context, _, _, mountpoint string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if mounts := k.mounts[mountpoint]; len(mounts) > 0 && mounts[len(mounts)-1].ReadOnly {
		return unix.EROFS // as of a filesystem that is smaller than its device
	}
	return k.stepLocked()
}

func (k fakeHost) Sync(string) error     { return nil }
func (k fakeHost) ReadEnds(string) error { return k.readEnds }

func (k fakeHost) Freeze(_ context.Context, path string, device uint64, _ time.Duration, _ string) (Frozen, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := errors.Join(k.stepLocked(), k.freezeErr); err != nil {
		return nil, err
	}
	k.frozen[path] = device
	k.freezes = append(k.freezes, path)
	return fakeFrozen{k.kernel, path}, k.stepLocked()
}

func (k fakeHost) ThawLeft(_ context.Context, path string, device uint64, _ string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if frozen, ok := k.frozen[path]; ok && frozen != device {
		return unix.ENODEV
	}
	if k.leftErr != nil {
		return k.leftErr
	}
	delete(k.frozen, path)
	return nil
}

// A fakeFrozen is a frozen mount of this kernel.
type fakeFrozen struct {
	*kernel
	path string
}

func (f fakeFrozen) Thaw(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.stepLocked(); err != nil {
		return err // its freezer ends with it, as in a container
	}
	delete(f.frozen, f.path)
	return f.thawErr
}
func (k fakeHost) Usage(string) (Usage, error) {
	return Usage{Total: 100, Available: 60, Used: 40}, nil
}
func (k fakeHost) SetReadOnly(string, bool) error { return k.step("set read-only") }

func (k fakeHost) DeviceNumber(path string) (uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if d := k.devices[path]; d != nil {
		return d.number, nil
	}
	if mounts := k.mounts[path]; len(mounts) > 0 {
		if d := k.devices[mounts[len(mounts)-1].device]; d != nil {
			return d.number, nil
		}
	}
	return 0, nil
}

// die ends every server of the kernel's devices.
func (k *kernel) die() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, d := range k.devices {
		d.dead = true
	}
}

// A rig is a machine with a pool and a driver that can be replaced.
type rig struct {
	t      *testing.T
	dir    string
	kernel *kernel
	pool   *volume.Pool
	driver *Driver
	stop   func()
	cache  string // Options.CacheID
	defers bool   // Restore is the test's
	csi.IdentityClient
	csi.ControllerClient
	csi.GroupControllerClient
	csi.NodeClient
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newGuardedRig(t, volume.Guard{})
}

// newGuardedRig is newRig with bounds of the pool.
func newGuardedRig(t *testing.T, guard volume.Guard) *rig {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"pool", "run"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	r := &rig{t: t, dir: dir, kernel: newKernel()}
	pool, err := volume.Open(t.Context(), filepath.Join(dir, "pool"), volume.Options{Guard: guard})
	if err != nil {
		t.Fatal(err)
	}
	r.pool = pool
	t.Cleanup(func() {
		r.stop()
		if err := pool.Close(); err != nil {
			t.Errorf("close the pool: %v", err)
		}
	})
	r.start()
	return r
}

// start makes a driver that serves on a socket.
func (r *rig) start() {
	r.t.Helper()
	d, err := New(r.t.Context(), Options{Version: "test", NodeID: "node-1", Pools: map[string]*volume.Pool{"default": r.pool},
		Attacher: fakeAttacher{r.kernel}, Host: fakeHost{r.kernel}, RunDir: filepath.Join(r.dir, "run"), MaxVolumes: 5, CacheID: r.cache})
	if err != nil {
		r.t.Fatal(err)
	}
	d.runDir.SetStep(r.kernel.step)
	if !r.defers {
		d.Restore(r.t.Context())
	}
	socket := filepath.Join(r.dir, "s")
	l, err := Listen(socket)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, l, time.Minute) }() // ends with ctx
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}))
	if err != nil {
		r.t.Fatal(err)
	}
	r.driver = d
	r.IdentityClient, r.ControllerClient, r.NodeClient = csi.NewIdentityClient(conn), csi.NewControllerClient(conn), csi.NewNodeClient(conn)
	r.GroupControllerClient = csi.NewGroupControllerClient(conn)
	r.stop = func() {
		conn.Close()
		cancel()
		if err := <-served; err != nil {
			r.t.Errorf("serve: %v", err)
		}
		d.Close()
	}
}

// restart replaces the driver as a restart of its process does.
func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.kernel.die()
	r.kernel.arm(-1)
	r.start()
}

func mountCap(fstype string, flags ...string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fstype, MountFlags: flags}},
	}
}

func blockCap() *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func withMode(c *csi.VolumeCapability, mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	c.AccessMode.Mode = mode
	return c
}

// volume makes a volume of 4 MiB.
func (r *rig) volume(name string, source *csi.VolumeContentSource) string {
	r.t.Helper()
	return r.create(&csi.CreateVolumeRequest{Name: name, VolumeContentSource: source})
}

// create makes a volume of 4 MiB that request describes otherwise.
func (r *rig) create(request *csi.CreateVolumeRequest) string {
	r.t.Helper()
	request.VolumeCapabilities = []*csi.VolumeCapability{mountCap("")}
	request.CapacityRange = &csi.CapacityRange{RequiredBytes: 4 << 20}
	resp, err := r.CreateVolume(r.t.Context(), request)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetVolume().GetVolumeId()
}

func (r *rig) path(name string) string { return filepath.Join(r.dir, name) }

func (r *rig) stageRequest(id string, c *csi.VolumeCapability) *csi.NodeStageVolumeRequest {
	return &csi.NodeStageVolumeRequest{VolumeId: id, StagingTargetPath: r.path("staging"), VolumeCapability: c}
}

func (r *rig) publishRequest(id string, c *csi.VolumeCapability) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{VolumeId: id, StagingTargetPath: r.path("staging"), TargetPath: r.path("target"), VolumeCapability: c}
}

func (r *rig) stage(id string, c *csi.VolumeCapability) error {
	_, err := r.NodeStageVolume(r.t.Context(), r.stageRequest(id, c))
	return err
}

func (r *rig) publish(id string, c *csi.VolumeCapability) error {
	_, err := r.NodePublishVolume(r.t.Context(), r.publishRequest(id, c))
	return err
}

func (r *rig) unpublish(id string) error {
	_, err := r.NodeUnpublishVolume(r.t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: r.path("target")})
	return err
}

func (r *rig) unstage(id string) error {
	_, err := r.NodeUnstageVolume(r.t.Context(), &csi.NodeUnstageVolumeRequest{VolumeId: id, StagingTargetPath: r.path("staging")})
	return err
}

// wantClean checks that nothing of a volume is left on the node.
func (r *rig) wantClean() {
	r.t.Helper()
	r.kernel.mu.Lock()
	defer r.kernel.mu.Unlock()
	for target, mounts := range r.kernel.mounts {
		if len(mounts) > 0 {
			r.t.Errorf("%d mounts left at %q", len(mounts), target)
		}
	}
	for path, d := range r.kernel.devices {
		if !d.dead {
			r.t.Errorf("device %s of %s left", path, d.id)
		}
	}
	hints, err := filepath.Glob(filepath.Join(r.dir, "run", hintsDir, "*"))
	if err != nil || len(hints) > 0 {
		r.t.Errorf("hints left: %q, %v", hints, err)
	}
}
