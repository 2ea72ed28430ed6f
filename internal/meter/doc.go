// Package meter counts what is asked of an NBD backend: requests, bytes,
// errors and the time that each took, by kind. It knows no format of metrics.
//
// # Support
//
//	kinds    read, write, write zeroes, discard, flush
//	times    a histogram of powers of two from 32.768 µs to 2.1 s, and beyond
//	depth    requests that have begun and not ended
//
// BlockStatus is not counted: it moves no data.
//
// # Terms
//
// A shard is a part of a counter; the offset of a request chooses it, so that
// requests at different places share no cache line. A snapshot of a meter is the
// sum of its shards, each right for some moment of the call.
//
// # Concurrency
//
// Everything may be used by many goroutines at once. Counting takes no lock and
// allocates nothing: two readings of the clock and four atomic additions.
//
// # Failure
//
// A request that fails is counted with its time, and as an error.
//
// # Spec
//
// None.
package meter
