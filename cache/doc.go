// Package cache is a writeback cache of metadata tables, shared by all images
// of a process within one budget of memory. A table is an array of big-endian
// 64-bit words at some offset of some file, ordered against others by a class;
// what the words mean is not known here. The cache does not open files, does not
// log, and decides nothing about the format whose tables it holds.
//
// A Cache has a Handle for each image, and a Handle gives out Tables: a Table
// is a slice of a table, pinned in a slot of the cache's arena.
//
//	c, err := cache.New(cache.Options{Bytes: 64 << 20})
//	go c.Run(ctx)
//	h, err := c.Open(file, cache.HandleOptions{Classes: 3})
//	t, err := h.Get(2, off)
//	t.Store(7, entry)
//	t.Unpin()
//	err = h.WriteBack() // durable
//
// # Support
//
//	slices                 512, 1024, 2048 and 4096 bytes, one size per image
//	classes                up to 4 per image
//	images                 131,071 open at once
//	file offsets           below 2^56
//	budget                 32 KiB to 1 TiB
//	arenas                 anonymous memory; a shared file that survives its process
//	systems                Linux
//	partly written tables  not supported: a slice is read and written as a whole
//	direct I/O             yes: buffers start at a page, see alignedBuffer
//
// # Terms
//
//	table      the cached unit: a slice of SliceBytes, at a multiple of them
//	slot       4096 bytes of the arena: the place of a table
//	set, way   a table can be in the eight ways, each one slot, of one set
//	pin        to keep a table in its slot; a Table is pinned until Unpin
//	seal       to keep hits away from a way while what it holds changes
//	dirty      newer than the file
//	pass       one run of WriteBack over an image: copy, write, sync
//	attic      heap memory for dirty tables of a failed image
//	arena      the memory of the slots and of the directory that describes them
//	takeover   a new process goes on with the arena of a killed one
//	mark       a note in the arena that an image has failed
//
// # Classes and edges
//
// An edge says that one change must be durable before another is written: a
// reference count before the entry that references, data before the entry that maps it.
// The cache does not keep edges. It keeps an order that has every edge a caller
// can ask for: the caller gives what others depend on the lower class, and
// stores it first. A pass then
//
//  1. copies the dirty tables, those of the highest class first and those of class
//     0 last. A table whose copy has a change was stored after what the change
//     depends on; so that is in a lower class's copy, taken later, or in the file.
//  2. writes the copies of class 0, and then for each higher class that has
//     copies: syncs, and writes them. The sync began after the copies were taken,
//     so it also makes durable what the caller wrote to the file, past the cache,
//     before it stored.
//  3. syncs.
//
// So a pass syncs once, and at most once more for each class above 0 that has
// dirty tables. A change whose order is the reverse (an entry goes before its
// reference count falls) is the caller's: it holds the second back until the
// first is durable, for which Mark and Done are made.
//
// Rejected: dependencies between tables, as QEMU's qcow2_cache_set_dependency
// keeps between caches: one dirty table that depends the other way makes the
// whole other cache flush at once, in the path of a request. Writing in the
// order of the stores: a log, and as many syncs as changes.
//
// # Invariants
//
//  1. A table is in at most one slot, or in the attic.
//  2. A way whose pin count is above 0 is not sealed, and keeps its key and its slot.
//  3. A sealed way belongs to the holder of its set's lock, or to one fill.
//  4. A slot's content and directory entry are complete before its state is
//     other than free, and do not become another table's before it is free again.
//  5. A store changes the content first and the state second; a pass reads the
//     state first and the content second, and cleans the state only if its
//     sequence is still the same. So no store is lost.
//  6. A dirty slot is in the dirty list of its class, in an item of the running
//     pass, or both its handle's lock and its way are held on the way there. A clean
//     slot is in the clean list.
//  7. A clean slot's content has been read from the file, or written and synced.
//  8. Class 1 and above is written in a pass only, after a sync that began when
//     the copy was there.
//  9. Once a write or a sync has failed, nothing of the image is written.
//  10. No lock is held over I/O, a wait or a callback.
//
// # Concurrency
//
// All methods may be called from many goroutines at once. A caller has no
// table pinned when it calls Get, Create, Drop, Close or Discard. Locks, each before those
// below it:
//
//	Cache.mu        the handles; never with a set's lock
//	set.mu          misses, replacement and drops in one set
//	  Handle.mu     lists, passes and counts of one image; one at a time
//	    marks.mu    which images have failed
//
// A hit takes none of them. The goroutines are those of running passes, at
// most two per image: one runs, and one may still be in OnWriteBack. Close and
// Discard wait for them. Run is the caller's goroutine. A file whose I/O hangs
// holds up its own image, and those that need a way which is dirty with it.
//
// # Memory
//
// The arena takes the budget and 64 bytes per slot, the sets and the lists 40
// bytes per slot. A pass copies at most 1024 tables (4 MiB) of each class at a time. A
// failed image keeps on the heap what others have displaced of it.
//
// # Failure
//
// A failed load is an error of those who waited for it and of nobody else. A
// failed write or sync is sticky (Err): the image's passes return it, what is
// dirty stays dirty and is read back, other images go on. See attic for what that
// costs.
//
// After a power loss the file holds, of each image, all that was stored before
// the last pass that succeeded began, and of later stores a set that has every
// edge.
//
// After the process was killed, a successor with the same arena file finds all
// that was stored: in the file, or dirty in the arena. Create and Drop do not keep
// the table's former content: a kill may take it although they have not
// returned. An arena of another boot, generation or layout, or a damaged one, is
// refused as a whole (ArenaError): that is a power loss. That an image had failed is
// in the arena too, until it is closed: Marked tells the successor. Its header has a
// checksum, so has the identity in each entry, and each state a parity; the
// content of the tables has none, as little as any memory of a process. An image that
// other processes have written since must not be claimed by the same ID: whoever
// opens images changes the ID with every attachment that is not a takeover.
//
// # Takeover
//
// What makes a takeover safe, by the numbers that code and tests cite:
//
//	A1  A table's content is stored before the word that publishes it.
//	    TestKillPoints, TestPassInsideStore, TestRealKills
//	A2  Nothing that was acknowledged is on the heap alone: data is in the page
//	    cache of the image, metadata there or in the arena. TestNBDKilledUnderLoad
//	    and TestKilledAnywhere, of the packages above
//	A3  The arena's memory is allocated at the start, and locked on request: it
//	    cannot run out later. TestArenaErrorsName, TestLockedArena
//	A4  It is in a directory of the host, which outlives pods: deploy/kubernetes/check
//	A5  It counts against the memory limit of the process that made it; the
//	    heap gets the rest. TestHeapLimit of cmd/csi-qcow2
//	A6  Layout, boot, generation and checksums are right, or all of it is refused.
//	    TestDamagedArenaIsRefused, TestStaleArenaIsNotUsed of volume
//	A7  One process has it: a lock that goes with the last thread of the one
//	    before, and the images' own locks. TestArenaFileIsLocked
//	A8  A process that ends in order leaves nothing in it, so that its layout may
//	    change; else another layout is refused. TestArenaAfterCloseIsEmpty
//	A9  No program that the process starts keeps a lock.
//	    TestDescriptorsAreNotInherited of cmd/csi-qcow2
package cache
