package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"csi-qcow2/cache"
	"csi-qcow2/driver"
	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

// nodeFlags are the flags of `csi-qcow2 node`.
type nodeFlags struct {
	endpoint    string
	pools       poolFlags
	nodeID      string
	runDir      string
	device      string
	driverName  string
	cacheBytes  int64
	maxVolumes  int64
	copyRate    int64 // bytes per second
	drain       time.Duration
	deadConn    time.Duration
	startHolder bool
	guard       guardFlags
	servers     serverFlags
	log         logFlags
}

// A poolFlag is one --pool NAME=DIR.
type poolFlag struct{ name, dir string }

// poolFlags implements pflag.Value; each use of the flag adds one.
type poolFlags []poolFlag

// poolName is what a StorageClass may call a pool.
var poolName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

// Set implements pflag.Value.
func (p *poolFlags) Set(s string) error {
	name, dir, ok := strings.Cut(s, "=")
	switch {
	case !ok || !filepath.IsAbs(dir):
		return fmt.Errorf("want NAME=DIR with an absolute path")
	case !poolName.MatchString(name):
		return fmt.Errorf("pool name %q: want at most 63 letters a-z, digits, dots and hyphens", name)
	}
	dir = filepath.Clean(dir)
	for _, other := range *p {
		if other.name == name {
			return fmt.Errorf("pool %q is given twice", name)
		}
		if other.dir == dir {
			return fmt.Errorf("pools %q and %q have one directory; give each its own", other.name, name)
		}
	}
	*p = append(*p, poolFlag{name, dir})
	return nil
}

// String implements pflag.Value.
func (p *poolFlags) String() string {
	parts := make([]string, len(*p))
	for i, pool := range *p {
		parts[i] = pool.name + "=" + pool.dir
	}
	return strings.Join(parts, ",")
}

// Type implements pflag.Value.
func (p *poolFlags) Type() string { return "NAME=DIR" }

// The pool that is served when no --pool is given.
const defaultPoolDir = "/var/lib/csi-qcow2"

func defaultNodeFlags() nodeFlags {
	host, err := os.Hostname()
	if err != nil {
		host = "" // --node-id is required then
	}
	return nodeFlags{
		endpoint:    "unix:///var/lib/kubelet/plugins/" + driver.DefaultName + "/csi.sock",
		nodeID:      host,
		runDir:      "/run/csi-qcow2",
		device:      nbdexport.KindAuto,
		driverName:  driver.DefaultName,
		cacheBytes:  64 << 20,
		drain:       defaultDrain,
		deadConn:    defaultDeadConn,
		startHolder: true,
		guard:       defaultGuardFlags(),
		log:         defaultLogFlags(),
	}
}

func (f *nodeFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.endpoint, "endpoint", f.endpoint, "unix socket to serve CSI on")
	flags.Var(&f.pools, "pool", "a pool: its name in StorageClasses and its directory; may be repeated (default default="+defaultPoolDir+")")
	flags.StringVar(&f.nodeID, "node-id", f.nodeID, "ID of this node, at most 256 bytes")
	flags.StringVar(&f.runDir, "run-dir", f.runDir, "directory for state that need not outlive a reboot")
	flags.StringVar(&f.device, "device", f.device, "kind of block device: nbd, fuse (loop over FUSE), or auto for nbd where the kernel has it")
	flags.StringVar(&f.driverName, "driver-name", f.driverName, "CSI driver name, also the domain of the topology key")
	flags.Int64Var(&f.cacheBytes, "cache-bytes", f.cacheBytes, "memory for the metadata of all images together, in bytes")
	flags.Int64Var(&f.maxVolumes, "max-volumes", f.maxVolumes, "volumes that can be staged at once; 0 sets no limit")
	flags.Int64Var(&f.copyRate, "copy-bandwidth", f.copyRate, "what volumes with cloneMode=copy copy in the background, in bytes per second and pool; 0 sets no limit")
	flags.DurationVar(&f.drain, "drain-timeout", f.drain, "how long running calls may take to finish after SIGTERM")
	flags.BoolVar(&f.startHolder, "start-holder", f.startHolder, "start csi-qcow2 holder for fuse devices when none answers; false where one runs in a container of its own")
	flags.DurationVar(&f.deadConn, "dead-connection-timeout", f.deadConn, "how long requests for an nbd device wait while no process serves it, before they fail: the time that a restart may take")
	f.guard.add(flags)
	f.servers.add(flags)
	f.log.add(flags)
}

// poolOptions returns the options of each pool, whose tables are in tables.
func (f *nodeFlags) poolOptions(tables *cache.Cache) volume.Options {
	return volume.Options{Cache: tables, Guard: f.guard.guard(), CopyBandwidth: f.copyRate}
}

const (
	defaultDrain    = 30 * time.Second
	defaultDeadConn = 10 * time.Minute
)

// The bounds of --cache-bytes: a few images' hot tables, and what one node can spare.
const (
	minCacheBytes = 1 << 20
	maxCacheBytes = 1 << 36
)

// validate completes the flags and returns all problems at once.
func (f *nodeFlags) validate() error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := driver.ParseEndpoint(f.endpoint); err != nil {
		fail("--endpoint: %w", err)
	}
	if len(f.pools) == 0 {
		f.pools = poolFlags{{"default", defaultPoolDir}}
	}
	if f.nodeID == "" || len(f.nodeID) > 256 {
		fail("--node-id %q: want 1 to 256 bytes", f.nodeID)
	}
	if !filepath.IsAbs(f.runDir) {
		fail("--run-dir %q: want an absolute path", f.runDir)
	}
	switch f.device {
	case nbdexport.KindAuto, nbdexport.KindNBD, nbdexport.KindFUSE:
	default:
		fail("--device %q: want nbd, fuse or auto", f.device)
	}
	if !driver.ValidName(f.driverName) {
		fail("--driver-name %q: want a domain name of at most 63 characters", f.driverName)
	}
	if f.cacheBytes < minCacheBytes || f.cacheBytes > maxCacheBytes {
		fail("--cache-bytes %d: want %d to %d", f.cacheBytes, minCacheBytes, int64(maxCacheBytes))
	}
	if f.maxVolumes < 0 {
		fail("--max-volumes %d: want 0 or more", f.maxVolumes)
	}
	if f.copyRate < 0 {
		fail("--copy-bandwidth %d: want 0 or more", f.copyRate)
	}
	if f.drain <= 0 || f.drain > time.Hour {
		fail("--drain-timeout %s: want more than 0, at most 1h", f.drain)
	}
	if f.deadConn < time.Second || f.deadConn > 24*time.Hour || f.deadConn%time.Second != 0 {
		fail("--dead-connection-timeout %s: want whole seconds, 1s to 24h", f.deadConn)
	}
	return errors.Join(append(errs, f.guard.validate(), f.servers.validate(), f.log.validate())...)
}
