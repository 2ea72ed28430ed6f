// Package volume keeps the volumes of a pool: a directory of qcow2 images with
// a record beside each. It knows which volumes and snapshots exist, what they
// were made from, what still depends on them, and opens their images. It knows
// no CSI, no gRPC and no kernel device, and it never runs a program.
//
//	<pool>/pool.json                            marker: layout version, pool UUID
//	<pool>/lock                                 locked while a process owns the pool
//	<pool>/incoming/                            creations in progress, emptied at start
//	<pool>/volumes/<volume ID>/disk.qcow2
//	                           volume.json      record: name, size, parameters, source, state
//	                           snapshots/<snapshot ID>.json
//	                           views/<snapshot ID>.qcow2
//	<pool>/groups/<group ID>.json               record of a group snapshot
//
// # Support
//
//	Volume              one qcow2 image, version 3, clusters of 4 KiB to 2 MiB
//	Snapshot            an internal snapshot of that image, named by its snapshot ID
//	Restore, clone      an overlay over a view (see view.go); the source stays attached and flat
//	Clone of a volume   a hidden internal snapshot and a clone of it
//	Clone modes         linked; copy: linked, and copied in the background (copy.go); reflink on XFS
//	                    and btrfs (reflink.go); auto: reflink where possible, else linked
//	Depth               16 clones of clones; a copy or a reflink begins anew
//	Group snapshot      of volumes of one pool, at one moment, all or none (group.go)
//	Revert              to a snapshot, while nobody uses the volume; later snapshots stay (revert.go)
//	Report              volumes, snapshots and clones, and who holds whose space (report.go)
//	Expand              attached or not; shrinking is refused
//	Delete              in any order; see Durability / Failure
//	Several processes on one pool: not supported, the second is refused with ErrPoolInUse
//	Moving a pool to another path: this package follows; stock QEMU tools need the path
//	that the overlays name
//
// # Terms
//
// A view is a tiny image through which stock QEMU sees an internal snapshot as
// an image of its own. A dependent of a snapshot is an overlay whose backing
// file is the snapshot's view. A tombstone is a volume or snapshot that was
// deleted but is still needed by a snapshot or a dependent. A hidden snapshot
// was made for the clone of a volume: nobody but its dependents sees it. The
// reaper removes what nothing needs any more. The copier makes volumes of
// CloneCopy independent of their sources.
//
// # Concurrency
//
// All methods of a [Pool] may be called from many goroutines at once. One
// operation changes a volume at a time: a second gets ErrBusy at once. A change
// that has begun is finished even when its caller goes away; the retry finds
// the result. Lock order:
//
//	ID lock of a new volume, snapshot or group (keyLock)
//	  ID locks of the source or owning volumes, several in ID order
//	    entry.writeMu      one record; held over its durable write
//	      guard.mu         what is promised and not in the index yet
//	      Pool.mu          the index; never held over I/O
//	        shared.mu      the table of open images or views; never held over I/O
//
// # Durability / Failure
//
// When a method returns nil, its effect survives a power loss. When the process
// or the machine dies inside a method, the effect is there whole or not at all,
// and the method can be called again by the next process: what it left is
// either used or removed. Volumes are made in incoming/ and appear in one
// rename. A snapshot's record says "creating" before the image is changed: what
// an image holds under such a name was promised to nobody. Deleting writes a
// tombstone first. The record of a group decides for its members. A revert says
// where to before the image changes, and whoever opens the image finishes it.
// Dependents are read from the backing names in the images'
// own headers, so that a lost or damaged record never frees what an overlay reads.
//
// A record says whether its image is open read-write. When it does at open, the
// last user died: the image is checked and its leaks are repaired before use.
// Corruptions are never repaired here: the image is refused with ErrCorrupt.
//
// # Spec
//
// QEMU docs/interop/qcow2.rst and the json: file names of qemu(1), version 10.2;
// openat2(2), rename(2), flock(2) of Linux man-pages 6.
package volume
