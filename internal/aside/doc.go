// Package aside makes system calls in a child process: those that may wait for
// a block device that this process serves itself.
//
// A thread that waits in the kernel for such a device cannot be killed before
// the wait ends. When the process is killed meanwhile, that thread stays, and
// with it every descriptor of the process: the kernel does not see that the
// device has lost its server, and no successor gets the locks. The device waits for
// the process, the process for the device, for ever. A child shares no descriptor
// with its parent. It may wait: the successor serves the device, and the child ends.
//
// # Support
//
//	Processes whose main calls Main   calls are made by a child: the same program again
//	Others (tests)                    calls are made by the process itself
//	Arguments and results             what encoding/json can carry; descriptors of files
//
// # Terms
//
// An operation is a function with a name, made with Op before main begins. A call
// is one run of it.
//
// # Concurrency
//
// Operations may be called from many goroutines at once; each call is a
// process. A call whose context ends returns; its child goes on, and is reaped
// when it ends.
//
// # Failure
//
// A child is killed when its parent dies, so that no call goes on beside its
// repetition by a successor: it ends before its next system call. The text of an error
// comes back, and so do its errno and the sentinels that the operation names.
package aside
