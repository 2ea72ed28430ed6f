package qcow2

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"csi-qcow2/cache"
)

// Options say how Open opens an image. The zero value opens read-write with a
// private cache and without its backing file.
type Options struct {
	// ReadOnly opens without writing anything, not even a repair.
	ReadOnly bool
	// Snapshot, if not "", opens the internal snapshot with this ID, or else
	// this name, instead of the active state. It requires ReadOnly.
	Snapshot string
	// Cache is the metadata cache to use; nil makes a private one of
	// DefaultCacheBytes that Close releases.
	Cache *cache.Cache
	// ID names the image in the cache, the same after a restart of the
	// process. Images that are open at the same time have different IDs; zero
	// stands for one that is never adopted by another process.
	ID [16]byte
	// Unclean says that the last opener did not close the image, as far as the
	// caller knows: Open gives back the clusters that it lost.
	Unclean bool
	// OpenBacking opens the backing file that the header names. Nil refuses
	// images that have a backing file, with ErrUnsupported. The image closes
	// what it returns.
	OpenBacking BackingOpener
	// PassDiscard gives the space of freed clusters back to the host file.
	PassDiscard bool
	// ReclaimAfter is how long a freed cluster waits at most for a Flush before
	// it is made available, and given back to the host, without one. Zero
	// leaves it to Flush and Close.
	ReclaimAfter time.Duration
	// Admit, if not nil, is asked before a write to the image, or a copy from its
	// backing file, allocates n bytes of clusters for data. Its error is the
	// write's. Clusters of tables are not asked for: they are few, and what frees
	// space needs some. It is called from many goroutines, and must not wait.
	Admit func(n int64) error
	// NoFlush makes Flush return at once and syncs nothing: cache=unsafe of the tools.
	NoFlush bool
}

// DefaultCacheBytes is the budget of a private cache.
const DefaultCacheBytes = 32 << 20

// A BackingOpener opens the backing file name, whose format the header gives
// as "qcow2", "raw" or "" (not recorded).
type BackingOpener func(ctx context.Context, name, format string) (Disk, error)

// An Image is an open qcow2 image. It implements Disk.
//
// States: open; failed, after a write or sync of metadata failed: reads go on,
// changes and Flush return ErrFailed with the first error; closed.
type Image struct {
	f       File
	name    string // of the host file, "" if unknown
	opts    Options
	geo     geometry
	version uint32
	handle  *cache.Handle
	own     *cache.Cache // the private cache, nil if shared
	serial  uint64       // grows with every image that is opened: the order of locking several

	size    atomic.Int64         // virtual size, bytes
	backing atomic.Pointer[Disk] // nil if none; DropBacking ends it; loaded inside a request
	l1      atomic.Pointer[l1Table]
	closed  atomic.Bool

	// structural is held by what changes the image as a whole: snapshots, resize,
	// check, close; one at a time, over their I/O. No request takes it.
	structural sync.Mutex
	// gate admits requests that change guest bytes (shared), and lets structural
	// changes wait for them and keep them out for a moment (alone).
	gate     sync.RWMutex
	cut      atomic.Pointer[cut] // the snapshot on its way, nil if none; set under gate held alone
	epochs   *epochs
	claims   claims        // of guest clusters
	l1Claims claims        // of L1 entries
	making   chan struct{} // one for each request that makes an L2 table

	allocator  allocator
	quarantine quarantine
	guard      guard
	packer     packer

	unclean bool // a change failed half way: the dirty bit must stay; guarded by structural

	hdrMu        sync.Mutex
	hdr          *header          // guarded by hdrMu, but for what never changes: version, compression
	records      []snapshotRecord // guarded by hdrMu
	recordsBytes int64            // length of the snapshot table in the file; guarded by hdrMu
}

// Close flushes, frees what waits to be freed, and closes the file and its
// backing chain. It waits for requests under way. A failed image is closed
// without writing anything more, and Close returns why it failed.
func (im *Image) Close() error {
	im.structural.Lock()
	defer im.structural.Unlock()
	im.gate.Lock()
	defer im.gate.Unlock()
	if im.closed.Swap(true) {
		return ErrClosed
	}
	im.epochs.synchronize()
	im.quarantine.stopTimer()
	err := im.failed()
	if err == nil && !im.opts.ReadOnly {
		err = im.settle()
	}
	if err == nil && !im.opts.ReadOnly {
		err = im.trimFile()
	}
	var herr error
	if err == nil {
		herr = im.handle.Close()
		if herr == nil && !im.opts.ReadOnly {
			herr = im.setStamp(false)
		}
	} else {
		herr = im.handle.Discard()
	}
	errs := []error{err, herr, im.f.Close()}
	if b := im.base(); b != nil {
		errs = append(errs, b.Close())
	}
	if im.own != nil {
		errs = append(errs, im.own.Close())
	}
	return errors.Join(errs...)
}

// settle writes back all tables and empties the quarantine.
//
// Preconditions: the gate is held alone, and no request is under way.
func (im *Image) settle() error {
	q := &im.quarantine
	if err := im.returnAhead(); err != nil {
		return err
	}
	for {
		if err := im.handle.WriteBack(); err != nil {
			return err
		}
		// Waits for a reclaim that is under way: it has taken its run out already.
		if err := im.reclaimInTurn(); err != nil {
			return err
		}
		if q.size() == 0 && im.handle.DirtyTables() == 0 {
			return nil
		}
	}
}

// trimFile cuts off what extendFile added beyond the last allocated cluster.
func (im *Image) trimFile() error {
	a, g := &im.allocator, &im.geo
	a.mu.Lock()
	end := int64(g.hostOffset(a.tail))
	a.mu.Unlock()
	if end >= a.fileEnd.Load() || a.tail == a.lowEnd {
		return nil
	}
	if err := im.f.Truncate(end); err != nil {
		return err
	}
	return im.f.Datasync()
}

// CacheStats returns what the metadata cache did for this image since it was
// opened: hits, misses, evictions, dirty tables.
func (im *Image) CacheStats() cache.Stats { return im.handle.Stats() }

// Size implements Disk.
func (im *Image) Size() int64 { return im.size.Load() }

// Check verifies the whole image. Writers wait while it runs. It repairs
// nothing: CheckFile does, on an image that is not open.
func (im *Image) Check(ctx context.Context, o CheckOptions) (CheckResult, error) {
	im.structural.Lock()
	defer im.structural.Unlock()
	im.gate.Lock()
	defer im.gate.Unlock()
	if im.closed.Load() {
		return CheckResult{}, ErrClosed
	}
	if !im.opts.ReadOnly {
		if err := im.failed(); err != nil {
			return CheckResult{}, err
		}
		im.epochs.synchronize()
		if err := im.settle(); err != nil {
			return CheckResult{}, err
		}
	}
	o.RepairLeaks, o.RepairAll, o.beyondEnd = false, false, true
	h, err := readHeader(im.f)
	if err != nil {
		return CheckResult{}, err
	}
	return checkFile(ctx, im.f, h, o)
}

// SetBacking rewrites the backing file name and format in the header
// (rebase -u): the content of clusters that are unallocated changes with it at
// the next open. An empty name removes the backing file, with a write that a
// power loss cannot tear; another name rewrites the header cluster.
func (im *Image) SetBacking(ctx context.Context, name, format string) error {
	im.structural.Lock()
	defer im.structural.Unlock()
	im.gate.Lock()
	defer im.gate.Unlock()
	if err := im.writable(); err != nil {
		return err
	}
	if err := im.handle.WriteBack(); err != nil {
		return err
	}
	im.hdrMu.Lock()
	h := *im.hdr
	im.hdrMu.Unlock()
	h.backingName, h.backingFormat = name, format
	if name == "" {
		return im.writeNoBacking()
	}
	cluster, err := h.encodeCluster()
	if err != nil {
		return err
	}
	if err := im.writeHeader(0, cluster); err != nil {
		return err
	}
	im.setBackingFields(&h)
	return nil
}

// writeNoBacking takes the backing file name out of the header, with a write that
// a power loss cannot tear. Preconditions: im.structural is held.
func (im *Image) writeNoBacking() error {
	if err := im.writeHeader(hdrOffBackingFile, make([]byte, 12)); err != nil {
		return err
	}
	im.setBackingFields(&header{})
	return nil
}

// setBackingFields takes over what h says of the backing file. The header in memory
// is changed, not replaced: requests look at other fields.
func (im *Image) setBackingFields(h *header) {
	im.hdrMu.Lock()
	defer im.hdrMu.Unlock()
	im.hdr.backingName, im.hdr.backingFormat = h.backingName, h.backingFormat
	im.hdr.backingOffset, im.hdr.backingSize = h.backingOffset, h.backingSize
}
