// Package storagetest provides a simulated host file for tests of what must
// survive crashes and errors.
//
// # Purpose
//
// A Disk is a file in memory with the methods of qcow2.File. It can say what a
// real file cannot: which after-crash states were legal at each moment of a
// run (Log), what happens when the n-th operation fails (Fault), and how many
// syncs a run needed (Count).
//
// # Model of a power loss
//
// A file is a size and pages of 4096 bytes, as in the page cache of a kernel.
// Datasync makes both durable. After a power loss,
//
//   - each page that was changed since the last Datasync holds any version that
//     it had since then, the durable one included, independent of all others;
//   - a page may be torn: each of its 512-byte sectors comes from one of two
//     versions that followed each other;
//   - the size is any size that the file had since then, also independently;
//   - what lay beyond that size is gone and reads as zeroes.
//
// It is harsher than any one filesystem. Reordering, loss and partial writes
// of multi-page requests all follow from it.
//
// # Memory
//
// MemoryDir is a directory for real files that need not survive a power loss.
//
// # Conformance
//
// TestFile holds every implementation of the File interface to its contract;
// the simulated one must pass it too.
//
// # Concurrency
//
// All methods of a Disk may be called from many goroutines at once; each is
// atomic. A Log is read-only once its Disk is no longer written.
package storagetest
