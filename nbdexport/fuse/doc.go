// Package fuse serves one regular file as a FUSE file system, so that another
// process can go on serving it when this one is killed. It is a server for the
// loop driver and its like: no directories, no names but one, no page cache.
//
// # Support
//
//	Request                      Answer
//	INIT                         since Linux 5.0 (protocol 7.28); 256 KiB in one READ or WRITE
//	LOOKUP GETATTR STATFS        the root and the file; nothing is cached by the kernel
//	OPENDIR READDIR RELEASEDIR   the root with the file
//	OPEN                         direct I/O, parallel writes; EROFS to write where that is not allowed
//	READ WRITE FSYNC             the File
//	FALLOCATE                    PUNCH_HOLE as zeroes that may unmap, ZERO_RANGE; else EOPNOTSUPP
//	FLUSH RELEASE DESTROY        success, and nothing more
//	SETATTR                      EPERM: the size is the server's
//	FORGET BATCH_FORGET          nothing; they have no answer
//	INTERRUPT                    ENOSYS: every request is answered
//	LSEEK, attributes, others    ENOSYS
//
// # Terms
//
// The device is the descriptor of /dev/fuse that a mount was made with: each
// read of it takes one request, each write answers one. The requests of a mount
// fail only when the last copy of the device is closed. A slot is memory for one
// request; a reader is a goroutine with a slot. The slots of a mount are a file
// in memory, as its device is: another process may hold both (see package
// holder), and whoever has both can go on.
//
// # Survival
//
// The kernel puts a request in the slot in the same system call that takes it
// from the queue, and a process cannot be killed between the two. So when a
// process was killed, each request is in the queue, or in a slot, or answered.
// Adopt goes on with what is in the slots:
//
//	killed                          the slot then has        the successor
//	waiting for a request           an answered request      answers again: no such request
//	with a request in the slot      a request                executes and answers it
//	while executing it              a request                executes it again: the same bytes
//	                                                         at the same place
//	after executing a WRITE or      a request that is        answers it, and does not execute it:
//	FALLOCATE                       marked as done           once answered, it may have been
//	                                                         overtaken by a newer one
//	while answering, afterwards     the same                 answers again: no such request
//	not at all; it was left         a request                executes and answers it
//
// What changes nothing is executed again whenever it is found. Requests are
// numbered and no number is used twice, so an answer never reaches another
// request.
//
// The kernel copies to and from the slot page by page, and it refuses to bring
// in a page for a process that is being killed: the request then fails with EIO.
// So the slots are populated and locked before they are used, and replies leave
// from there too. A page that the kernel itself moves at that very moment is
// what is left of it. Such a request would be in the slot in part: a canary at
// the start of each page tells, and a request in part is not executed.
//
// # Concurrency
//
// A Conn has two readers, and more when the File is slow; all of them end before
// Close returns. Each answers what it has read before it reads again, and ends with
// one that it cannot answer, see ErrUnanswered. There is no lock over a request. At most one process may serve a mount; a lock on the slots
// is the last fence for that.
//
// # Spec
//
// include/uapi/linux/fuse.h of Linux 6.18, protocol 7.45.
package fuse
