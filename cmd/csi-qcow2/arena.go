package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/cache"
	"csi-qcow2/internal/durable"
)

// An arena is the metadata cache of a node process. Its memory is a file in the run directory: when the
// process is killed the tables that it had not written are still there, and the next process goes on with
// them. A process that ends in order leaves the file empty, so that the next one may lay it out as it likes.
//
//	arena       the file, see package cache
//	arena.json  record, kind "csi-qcow2 cache", version 1: the ID
//
// The ID stays the same from process to process until what a file held is lost.
type arena struct {
	*cache.Cache
	path string
	id   string
}

const (
	arenaName       = "arena"
	arenaRecordName = "arena.json"
	arenaKind       = "csi-qcow2 cache"
	arenaVersion    = 1

	// claimWait is how long requests to images that were taken over wait for the other images.
	claimWait = time.Minute
)

type arenaRecord struct {
	ID string `json:"id"`
}

// openArena opens a metadata cache of the given budget in runDir. It waits for a predecessor that is
// ending, so long at most. The memory is locked where that is
// allowed: paging it in could need memory that only its own write back frees.
func openArena(ctx context.Context, wait time.Duration, runDir string, bytes int64) (_ *arena, err error) {
	dir, err := durable.OpenDir(runDir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, dir.Close()) }()
	a := &arena{path: filepath.Join(runDir, arenaName)}
	if a.id, err = readArenaID(dir); err != nil {
		return nil, err
	}
	if a.id == "" {
		if a.id, err = newArenaID(dir); err != nil { // before the arena exists
			return nil, err
		}
	}
	o := cache.Options{Bytes: bytes, Path: a.path, Lock: true, ClaimWait: claimWait}
	err = waitFor(ctx, wait, cache.ErrInUse, func() error {
		a.Cache, err = cache.New(o)
		return err
	})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EAGAIN) {
		klog.ErrorS(err, "the cache is not locked in memory; raise the limit (ulimit -l) or grant CAP_IPC_LOCK")
		o.Lock = false
		a.Cache, err = cache.New(o)
	}
	if errors.Is(err, cache.ErrArenaLayout) {
		return nil, fmt.Errorf("%w; start the version that left it and stop it with SIGTERM, which empties it; or remove the file, and what was not flushed is lost as in a power loss", err)
	}
	if errors.Is(err, cache.ErrArena) {
		klog.ErrorS(err, "the predecessor's cache cannot be used: what was not flushed is lost, as in a power loss")
		if a.id, err = newArenaID(dir); err != nil {
			return nil, err
		}
		o.Fresh = true
		a.Cache, err = cache.New(o)
	}
	return a, err
}

// readArenaID returns the ID of the arena that a predecessor left, "" when there is none.
func readArenaID(dir *durable.Dir) (string, error) {
	var rec arenaRecord
	err := durable.ReadRecord(dir, arenaRecordName, arenaKind, arenaVersion, &rec)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, durable.ErrDamaged) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if exists, err := dir.Exists(arenaName); err != nil || !exists {
		return "", err
	}
	return rec.ID, nil
}

func newArenaID(dir *durable.Dir) (string, error) {
	rec := arenaRecord{ID: rand.Text()}
	return rec.ID, durable.WriteRecord(dir, arenaRecordName, arenaKind, arenaVersion, rec)
}

// close ends the cache. When all that it held is in the images it empties the file.
func (a *arena) close() error {
	left := len(a.Unclaimed())
	if err := a.Close(); err != nil {
		return err
	}
	if left > 0 {
		klog.InfoS("the cache keeps tables of images that could not be opened", "images", left)
		return nil
	}
	return os.Truncate(a.path, 0) // the run directory is still locked
}
