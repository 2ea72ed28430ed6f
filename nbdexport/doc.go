// Package nbdexport serves virtual disks over the NBD protocol, to programs
// over sockets and to the kernel as block devices. It declares Backend, what
// it serves, and knows nothing about image formats. It is no NBD client, and
// it does not decide who may connect: that is for the permissions of a socket.
//
// # Support
//
//	Handshake            fixed newstyle and newstyle; oldstyle is not supported
//	Options              EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY, EXTENDED_HEADERS,
//	                     LIST_META_CONTEXT, SET_META_CONTEXT
//	                     STARTTLS is not supported (ERR_POLICY); PEEK_EXPORT neither (ERR_UNSUP)
//	Information          EXPORT, NAME, DESCRIPTION, BLOCK_SIZE (1, 4096, 32 MiB)
//	Metadata contexts    base:allocation, qemu:allocation-depth; qemu:dirty-bitmap is not supported
//	Replies              simple, structured, extended (64-bit)
//
//	Command        Flags               Note
//	READ           DF                  up to 32 MiB; holes as chunks of their own from 64 KiB on;
//	                                   DF up to 2 MiB, beyond that EOVERFLOW
//	WRITE          FUA                 up to 32 MiB, more closes the connection
//	FLUSH                              covers what every connection has been told is done
//	TRIM           FUA                 any length
//	WRITE_ZEROES   FUA NO_HOLE         any length; FAST_ZERO is ENOTSUP where the backend cannot tell
//	               FAST_ZERO
//	CACHE                              up to the backend
//	BLOCK_STATUS   REQ_ONE             up to 4096 extents; a payload (BLOCK_STAT_PAYLOAD) is not supported
//	DISC                               requests sent before it are answered
//	RESIZE                             not supported (EINVAL)
//
// Transmission flags: HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM,
// SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO. FUA is
// accepted with every command and means something where content changes.
//
// # Terms
//
// An Export is a Backend under a name. A connection has a handshake, in which
// the client chooses an export, and a transmission phase, in which it sends
// requests. A request is validated, handled and replied to, by three
// functions: terms.validate rejects everything that is not allowed, so that
// conn.handle may rely on it. A request is answered in line when the goroutine
// that read it does all the work, see pace; a long write is received by that
// goroutine and written by another, piece by piece, see pieceWriter. The next request of
// a client that sends few at a time is waited for awake, see poller.
//
// # Bounds
//
//	Handshake            10 s, 32 options, 64 KiB of data each, names of 4096 bytes
//	Connections          100 at a time; others wait to be accepted
//	Memory               64 KiB for each connection, and 16 MiB more at most for requests under
//	                     way and replies that the client has not read; longer payload is moved
//	                     in pieces of 2 MiB, as it arrives or leaves. The kernel holds up to
//	                     1 MiB of replies on a unix socket, and its overhead
//	Goroutines           18 for each connection
//	CPUs                 half of GOMAXPROCS at most are used to wait awake
//	Unread replies       60 s to 2 min without a byte read, then the connection is closed
//	Block status         4096 extents in a reply, 65536 calls of the backend for it
//
// The backend is not touched, except for its Size, before the transmission
// phase begins.
//
// # Concurrency
//
// A Server may be used from many goroutines at once. Each connection is a
// goroutine that reads, and workers that it starts when requests block; all of
// them end before Serve, ServeConn or ServeTransmission returns. Locks, none
// of which is held over I/O or a call of a backend:
//
//	Server.mu    the table of exports; leaf
//	sender.mu    one connection's replies and budget; leaf
//
// # Failure
//
// An error of the backend ends the request that met it, with the error number
// of wireErrorOf, or with no reply (ErrUnanswered), and nothing else. Where the
// protocol has no way to say so (a long read with simple replies that fails in
// the middle) the connection is closed. What a client may rely on after a reply
// is what Backend says about durability: the server adds nothing and holds
// nothing back.
//
// # Spec
//
// NBD protocol, doc/proto.md of https://github.com/NetworkBlockDevice/nbd at
// 89ba7b5, with extended headers. qemu:allocation-depth: docs/interop/nbd.rst of QEMU 7.2.
package nbdexport
