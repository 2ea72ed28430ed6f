package main

import (
	"errors"
	"path/filepath"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"csi-qcow2/cache"
)

// arenaName is the file in a run directory that holds the metadata cache.
const arenaName = "arena"

// openCache opens a metadata cache of the given budget. Its memory is a file in
// runDir: when this process is killed the tables that it had not written are
// still there, and the next process goes on with them. The memory is locked where
// that is allowed: paging it in could need memory that only its own write back frees.
func openCache(runDir string, bytes int64) (*cache.Cache, error) {
	o := cache.Options{Bytes: bytes, Path: filepath.Join(runDir, arenaName), Lock: true}
	tables, err := cache.New(o)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EAGAIN) {
		klog.ErrorS(err, "the cache is not locked in memory; raise the limit (ulimit -l) or grant CAP_IPC_LOCK")
		o.Lock = false
		tables, err = cache.New(o)
	}
	if errors.Is(err, cache.ErrArena) {
		klog.ErrorS(err, "the predecessor's cache cannot be used: what was not flushed is lost, as in a power loss")
		o.Fresh = true
		tables, err = cache.New(o)
	}
	return tables, err
}
