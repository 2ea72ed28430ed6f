// Package qcow2 is an engine for qcow2 images: it creates, opens, reads, writes,
// snapshots, resizes, checks and repairs them. It sees the host file through the
// interface File, logs nothing, keeps no global state but pools of buffers, and
// runs no program.
//
// # Support
//
//	Versions                2 and 3; images are created with version 3 unless asked
//	Cluster sizes           512 bytes to 2 MiB
//	Refcount widths         1 to 64 bits
//	Standard clusters       read, write, copy on write
//	Zero clusters           plain and allocated; version 2 writes zeroes instead
//	Compressed clusters     zlib and zstd: read; written by WriteCompressed only
//	Backing chains          qcow2, raw, or any Disk that a BackingOpener returns; shorter and longer ones
//	Internal snapshots      create (also of several images at once), delete, apply, open read-only; VM state is kept, not read
//	Lazy refcounts          the flag is kept; refcounts are written in time all the same
//	Flatten                 while guests use the image: Populate and DropBacking
//	Resize                  up; a version 2 image only without snapshots
//	Dirty bit               set during snapshot operations; images that have it are repaired when they are opened
//	Corrupt bit             read-only; CheckFile repairs
//	Persistent bitmaps      not supported: their autoclear bit is cleared when an image is opened read-write
//	Subclusters             not supported: refused
//	External data files     not supported: refused
//	Encryption              not supported: refused
//
// Unknown incompatible features are refused by name; unknown extensions and
// header bytes are kept.
//
// # Terms
//
// A guest offset is an address in the virtual disk, a host offset one in the
// image file. The active state is what a guest sees; an internal snapshot is an
// earlier state in the same file. A leak is a cluster that is counted and not
// used: space is lost. A corruption is a cluster that is used and not counted,
// or used twice: data is in danger. A table slice is the unit of the metadata
// cache, at most 4096 bytes of an L2 table, refcount block or other table. A
// pass is one write back of what the cache holds dirty of an image.
//
// # Concurrency
//
// All methods of an Image may be called from many goroutines at once. Reads and
// writes in place take no lock but a shared one that admits them. Writes that
// allocate claim the guest clusters that they change; only requests on the same
// clusters wait for each other. No lock of the engine is held over guest data I/O; an
// OSFile lets long writes through the page cache wait in turn, where the kernel's lock
// of the inode would make them. Lock order:
//
//	Image.structural          one structural change at a time; over its I/O
//	  Image.gate              shared: a request that changes guest bytes; alone: a cut
//	    claims                guest clusters of a request; over its I/O
//	      making              a place among the few that make L2 tables; over that I/O
//	      l1Claims            one L1 entry; over the I/O that makes its table
//	        quarantine.reclaimMu  refcounts that fall; over the I/O of a punch
//	        packer.mu         compressed writes
//	          allocator.growMu  new refcount blocks and file growth; over their I/O
//	            allocator.mu  free runs; never over I/O
//	              allocator.refcounts  the refcounts of a slice; never over I/O
//	              guard.mu, quarantine.mu, hdrMu, and the locks of package cache
//	                OSFile.turn, OSFile.rmw, OSFile.sync  one write or sync of a kind to a host file; over it
//
// # Durability / Failure
//
// When WriteAt, WriteZeroes or Discard returns, the change survives the death of
// the process, provided that the cache is in an arena (Options.ID) or is
// flushed. When Flush returns nil, everything that returned before the call
// survives a power loss. After any crash an image opens and is not corrupt; what
// is lost is at worst space, which the next open gives back (Options.Unclean).
// flush.go lists the order of writes that this rests on, as E1 to E9.
//
// After a write or sync of metadata has failed the image is failed: reads go on,
// changes and Flush return ErrFailed, and nothing more is written. An image is
// untrusted input: what its tables say is checked when it is used, and a
// *FormatError names the structure and its offset.
//
// # Spec
//
// QEMU docs/interop/qcow2.rst, version 10.2.
package qcow2
