package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/cache"
	"csi-qcow2/driver"
	"csi-qcow2/nbdexport"
	"csi-qcow2/volume"
)

func newNodeCommand() *cobra.Command {
	f := defaultNodeFlags()
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Serve CSI for the volumes of this node",
		Long: `Serve the whole Container Storage Interface for the volumes of this node: it owns
the pools, the images, the cache and the devices. It must run as root.

SIGTERM ends it: it refuses new calls, finishes those under way, flushes the
images and removes its socket. The devices of staged volumes stay (those of kind fuse for as
long as csi-qcow2 holder lives), and their requests wait for the next process with the same
--run-dir, which takes them over; so it does when the process was killed.`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.validate(); err != nil {
				return usageErrorf("%v", err)
			}
			return runNode(cmd.Context(), f)
		},
	}
	f.add(cmd.Flags())
	return cmd
}

// runNode serves until ctx ends.
func runNode(ctx context.Context, f nodeFlags) (err error) {
	f.log.apply()
	problems := protectMemory(f.cacheBytes)
	lock, err := lockRunDir(ctx, f.runDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()

	tables, err := openArena(ctx, predecessorWait, f.runDir, f.cacheBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, tables.close()) }()

	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var workers sync.WaitGroup
	defer workers.Wait()
	defer stop()
	workers.Go(func() { _ = tables.Run(background) }) // its error is the end of background

	pools := make(map[string]*volume.Pool)
	defer func() {
		for _, pool := range pools {
			err = errors.Join(err, pool.Close())
		}
	}()
	for _, p := range f.pools {
		err := waitFor(ctx, predecessorWait, volume.ErrPoolInUse, func() error {
			pool, err := volume.Open(ctx, p.dir, f.poolOptions(tables.Cache))
			if err == nil {
				pools[p.name] = pool
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return serveNode(ctx, f, pools, tables, problems)
}

// predecessorWait bounds the wait for a process that was killed to be gone: the kernel drops its locks when
// its last thread has ended.
const predecessorWait = 10 * time.Second

// waitFor repeats take while it fails with busy, for as long as wait.
func waitFor(ctx context.Context, wait time.Duration, busy error, take func() error) error {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		err := take()
		if !errors.Is(err, busy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// forgetUnclaimed drops the tables of images that are in no pool any more. Those
// of a volume that could not be recovered stay: a later attempt needs them.
func forgetUnclaimed(tables *cache.Cache, pools map[string]*volume.Pool) {
	for _, u := range tables.Unclaimed() {
		owned := false
		for _, p := range pools {
			owned = owned || p.Owns(u.ID)
		}
		if owned {
			continue
		}
		klog.InfoS("dropping cached tables of an image that is in no pool", "image", fmt.Sprintf("%x", u.ID), "tables", u.Tables)
		if err := tables.Forget(u.ID); err != nil {
			klog.ErrorS(err, "drop cached tables")
		}
	}
}

// serveNode runs the driver over open pools.
func serveNode(ctx context.Context, f nodeFlags, pools map[string]*volume.Pool, tables *arena, problems []string) (err error) {
	held := holderClient(f.runDir, f.startHolder)
	defer func() { err = errors.Join(err, held.Close()) }()
	attacher, err := nbdexport.NewAttacher(f.device, nbdexport.AttacherOptions{RunDir: f.runDir, DeadConnTimeout: f.deadConn, Holder: held})
	if err != nil {
		return err
	}
	d, err := driver.New(ctx, driver.Options{
		Name: f.driverName, Version: version, NodeID: f.nodeID, MaxVolumes: f.maxVolumes,
		Pools: pools, Attacher: attacher, Host: driver.NewHost(), RunDir: f.runDir,
		CacheID: tables.id, Warnings: problems,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	path, err := driver.ParseEndpoint(f.endpoint)
	if err != nil {
		return err
	}
	l, err := driver.Listen(path)
	if err != nil {
		return err
	}
	background, stop := context.WithCancel(ctx)
	var workers sync.WaitGroup
	defer workers.Wait()
	defer stop()
	workers.Go(func() { attacher.Run(background) })
	workers.Go(func() { d.SampleUsage(background) })
	for _, pool := range pools {
		workers.Go(func() { pool.Watch(background) })
	}
	workers.Go(func() {
		d.Restore(background)
		workers.Go(func() { d.Tidy(background) })
		runPools(background, pools, tables.Cache)
	})
	klog.InfoS("serving", "endpoint", path, "driver", f.driverName, "nodeID", f.nodeID, "device", attacher.Kind(), "version", version)
	err = f.servers.serve(ctx, d, l, f.drain)
	klog.InfoS("stopped", "endpoint", path)
	return err
}

// runPools recovers what a predecessor had open and nobody has taken over, and then does the pools'
// work in the background until ctx ends.
func runPools(ctx context.Context, pools map[string]*volume.Pool, tables *cache.Cache) {
	for _, pool := range pools {
		pool.Recover(ctx)
	}
	if ctx.Err() != nil {
		return
	}
	forgetUnclaimed(tables, pools)
	var workers sync.WaitGroup
	for _, pool := range pools {
		workers.Go(func() { pool.Run(ctx) })
	}
	workers.Wait()
}

// lockRunDir makes the run directory and takes its lock, which the kernel
// drops when the process ends, however it does.
func lockRunDir(ctx context.Context, dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = waitFor(ctx, predecessorWait, unix.EWOULDBLOCK, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("run directory %q is in use by another process; stop it first, or give another --run-dir", dir)
		}
		return nil, fmt.Errorf("lock run directory %q: %w", dir, err)
	}
	return f, nil
}
