// Package durable changes small files and directories so that a crash at any
// point leaves the old state or the new one, and so that what it reported as
// done stays done after a power loss. It refuses to follow symbolic links and
// to leave the directory it was given.
//
// # Support
//
//	Directory access   openat2 beneath one descriptor; no symbolic links, no magic links (Linux 5.6)
//	Atomic replace     write a temporary file, fsync, rename, fsync the directory
//	Records            JSON with a kind, a version and a CRC-32C; see [WriteRecord]
//	Concurrent writers of one name: not supported, the caller serialises them
//
// # Terms
//
// A record is a JSON document in an envelope that names its kind and version
// and carries a checksum. A step is one change of a directory: tests stop the
// world before and after each.
//
// # Concurrency
//
// A [Dir] may be used from many goroutines at once, on different names.
//
// # Durability / Failure
//
// When a method that changes something returns nil, the change survives a power
// loss. When it returns an error, the old state or the new one holds; the caller
// repeats the call or reads back. A temporary file (".NAME.tmp") may be left by
// a crash; the next write of NAME reuses it and [Dir.RemoveTemporary] drops it.
//
// # Spec
//
// open(2), openat2(2), rename(2), fsync(2) of Linux man-pages 6.
package durable
