// Package convert copies, compares and walks disks. Converting an image,
// flattening a clone and exporting a volume are all Copy.
//
// # Support
//
// Source and target are any qcow2.Disk. Copy asks the source for its block
// status over the whole backing chain: what is unallocated or zero is not
// read, and holes of the host files neither, so the cost follows the data and
// not the virtual size, with preallocated metadata too. Zeroes inside
// the data are found and not written. Targets that can are written compressed.
//
// # Terms
//
//	granule   the unit in which the target stores data: its cluster, or 4 KiB
//	segment   a range of the source that is copied, zeroed or left alone as one
//	chunk     a part of a data segment that one worker reads and writes
//
// # Concurrency
//
// One goroutine walks the source, Options.Workers copy chunks; all have ended
// when Copy returns. Memory is bounded by the number of workers times two
// chunks. Nothing else may write the target meanwhile; a source that is written
// gives each granule at some time during the copy.
//
// # Failure
//
// The first error ends the work; the target is then incomplete. Copy does not
// flush the target: what it wrote is durable after the target's Flush.
package convert
