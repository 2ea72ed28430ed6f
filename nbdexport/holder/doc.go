// Package holder keeps descriptors for a process that may be killed: a second,
// tiny process has copies of them, and gives them to the successor. It knows
// nothing of what they are.
//
// # Support
//
//	Transport       RunDir/holder.sock, SOCK_SEQPACKET, descriptors as SCM_RIGHTS
//	Peers           the same user, by SO_PEERCRED, on both sides
//	Put, Drop       under a name; putting a name again replaces what it had
//	Get, List       as often as wanted: a successor may be killed as well
//	Bounds          1024 names of 1 to 160 bytes, 4 descriptors each; 16 connections; 5 s for an exchange
//
// # Terms
//
// A Server is the process that holds, a Client the one that is held for. To hold
// something is to have a copy of its descriptors; the kernel closes what they
// stand for when the last copy is closed.
//
// # Concurrency
//
// A Server has a goroutine for each connection; all end before Serve returns. A
// Client may be used from many goroutines at once; its lock is held over an
// exchange, which does not wait for anything but the other process.
//
// # Failure
//
// When the holder dies, its Client starts or finds another and puts everything
// again. In between, and when both die at once, nothing is held: see Client.Err.
// SIGTERM does not end a holder that holds something, only what it holds for does.
package holder
