package qcow2

import "fmt"

// The order in which changes reach the file. After a power loss the file holds
// any subset of what was written since the last sync, so each line is a sync
// that stands between two writes. Tests name these numbers.
//
//	E1  Data, and what copy on write copied, is durable before the L2 entry
//	    that shows it: it is written before the entry is stored in the cache,
//	    and L2 tables are written only after a sync that began later. Not so for
//	    data in a cluster that was never written, where the guest saw zeroes
//	    before: what is lost of it is what the guest saw. That the file is long
//	    enough for the cluster is durable before the entry always.
//	E2  A refcount that rises is durable before the table entry that uses the
//	    cluster: class refblock and reftable before L2 before L1.
//	E3  A table entry that drops a cluster is durable before its refcount
//	    falls: the quarantine waits for the pass.
//	E4  A snapshot's refcounts are durable before COPIED flags change: E2's
//	    order again.
//	E5  A snapshot table is durable before the header names it.
//	E6  A new L1 or refcount table is durable before the header names it.
//	E7  The dirty bit is durable before refcounts that it excuses are written.
//	E8  A cluster that was dropped is neither reused nor punched before E3's
//	    sync, nor while requests that knew it are under way.
//	E9  (in the pool) A directory is synced after a file in it appears or is
//	    renamed.
//
// Refcounts only rise early and fall late, so whatever a crash leaves is at worst
// a leak. There is one direction of dependencies between the classes, so passes
// never need a cycle broken, unlike QEMU's, whose L2 and refcount caches may each
// wait for the other.

// Flush implements Disk. Concurrent calls share their passes. It costs one sync,
// two when there was something to order: refcounts that rose (not after every
// allocation, see allocator), copied or reused clusters; three when an L2 table is new.
func (im *Image) Flush() error {
	if err := im.flush(); err != nil {
		return err
	}
	// Best effort: what cannot be lowered now is a leak, not lost data. Whoever
	// has the gate alone empties the quarantine by itself.
	if im.gate.TryRLock() {
		if !im.closed.Load() && !im.opts.ReadOnly && !im.opts.NoFlush {
			_ = im.reclaim()
		}
		im.gate.RUnlock()
	}
	return nil
}

func (im *Image) flush() error {
	slot := im.epochs.enter() // Close waits for us, or we see that it has begun
	defer im.epochs.exit(slot)
	if im.closed.Load() {
		return ErrClosed
	}
	if im.opts.ReadOnly || im.opts.NoFlush {
		return nil
	}
	if err := im.failed(); err != nil {
		return err
	}
	if err := im.handle.WriteBack(); err != nil {
		return fmt.Errorf("qcow2: flush: %w", err)
	}
	return nil
}
