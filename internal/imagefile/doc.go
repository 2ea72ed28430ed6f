// Package imagefile opens image files by name, with their whole backing chain,
// as QEMU's tools do. The tools of this project use it; the driver does not:
// it never follows a name that an image contains without knowing it already.
//
// # Support
//
//	Name                         Meaning
//	path, file:path              a regular file or block device; links are followed
//	json:{…}                     drivers qcow2, raw, file and host_device, nested or with dotted keys;
//	                             keys driver, file, filename, force-share, read-only, size (raw), backing (null or an object)
//	other: protocols             refused
//
// A backing file name that is relative is looked up beside its overlay. The
// file child of a qcow2 driver may be another image, as in a header overlay;
// such a stack opens read-only.
//
// # Probing
//
// Without a format the first 512 bytes decide: a qcow2 magic is qcow2, a format
// that is known but not supported is refused, the rest is raw. A guest that
// can write a raw disk could make it look like another format later; a raw
// disk that was only probed therefore refuses to take such a first sector.
//
// # Locks
//
// Each file of the chain is locked as QEMU locks it: the top for writing or
// reading, backing files for reading, everything without excluding others
// when force-share is asked for.
//
// # Concurrency
//
// Open may be called from many goroutines at once. What it returns is a qcow2.Disk.
package imagefile
