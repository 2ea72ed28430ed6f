// Package imagebackend makes an open image the backend of an NBD export: the
// one place that knows both qcow2.Disk and nbdexport.Backend. It translates
// errors of images into error numbers and extents into the terms of NBD.
//
// # Support
//
//	Backend          qcow2.Image                 any other Disk
//	fast zero        version 3: always fast      refused: it may have to write
//	sparse reads     yes                         no: asking a host file for holes costs system calls
//	discard          passed on, or ignored as `--discard=ignore` of the tools
//
// # Concurrency
//
// A Backend may be used as a Disk may: from many goroutines at once.
//
// # Failure
//
// Every error of the image keeps its tree and text, and gains a syscall.Errno:
// see errno.
package imagebackend
