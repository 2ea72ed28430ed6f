// Package panics makes an error of a panic: a bug in the work for one volume must
// not end the process that serves the devices of all.
//
// # Support
//
//	Catch   runs a function; its panic, or that of what it calls in its goroutine, is an [Error]
//	Goroutines that the function starts: not covered, each has its own Catch
//
// # Terms
//
// None of its own.
//
// # Concurrency
//
// Catch may be called from many goroutines at once.
//
// # Durability / Failure
//
// What the function had locked without a deferred unlock stays locked: the volume
// that it was for may be unusable until the next start.
package panics
