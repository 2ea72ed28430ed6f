// # Devices
//
// An Attacher makes a kernel block device of a Backend. There are two kinds:
//
//	nbd     /dev/nbdN: the kernel's nbd driver speaks NBD over a socketpair to this process
//	fuse    /dev/loopN: a loop device over the only file of a FUSE mount that this process serves
//
//	                         nbd                              fuse
//	Kernel needs             nbd (a module of most            fuse, loop
//	                         distributions)
//	Discard, zeroes          TRIM; WRITE_ZEROES since 6.12    WriteZeroes with unmap, for both
//	FUA                      passed on                        a flush after the write
//	Resize while in use      yes                              yes
//	Openers at detach        mounts: by the kernel; others:   by the kernel
//	                         by /proc, in this PID namespace
//	This process dies        requests wait DeadConnTimeout    requests wait for the next one, while a
//	                         for the next one                 holder lives; without one they fail
//	What it acknowledged     is in the image                  is in the image
//	What the kernel has      is written by the next process   the same, while a holder lives; without one
//	not sent yet                                              it is lost, as at a power loss
//
// The fuse kind is for development machines and for kernels without nbd. Packages fuse and holder say
// how its requests outlive the process. Its promise is weaker, because the holder is a process as
// well: when both die, filesystems on the devices see I/O errors as if the disk were pulled. The
// images stay sound, and what an application has synced is in them. Stale lists what is left, to be
// unmounted, cleaned and attached anew. Device.Survives says when there is no holder.
//
// Life of a device: serve, then connect or mount; wait until the kernel shows the size; hand out.
// Detach: claim the device exclusively, as a mount does, so that none can begin; look for other
// openers; write back; disconnect or clear; unmount; flush the backend. Every step looks first
// whether the device is still ours: its name in sysfs (/sys/block/nbdN/backend,
// /sys/block/loopN/loop/backing_file) ends in ID@tag, where tag is of the run-dir. Indexes are used
// again by whoever asks next.
//
// No descriptor of a device (netlink, socketpair, /dev/fuse, control devices) is inherited by a
// child: one would hide this process's death from the kernel.
//
// # Known deadlocks
//
// The process is its own client's kernel. These are the ways to hang:
//
// Reclaim. The kernel needs memory, writes back pages of a filesystem on one of our devices, and
// waits for us, while we wait for the kernel to give us memory. Threads that serve must be marked
// with PR_SET_IO_FLUSHER (per thread, inherited by new ones: set, then re-exec), hot memory is
// locked, the heap is bounded by GOMEMLIMIT. Evidence: Linux 8d19f1c8e193, an nbd and XFS deadlock
// that the flag was made for.
//
// Touching what we serve. Opening, reading or writing a path on a filesystem that lies on one of
// our devices, from a goroutine that a request waits for. Statfs is enough: XFS may force the log.
// The runtime's poller counts too, so files in a FUSE mount of ours are opened with raw system
// calls. A thread that waits so when the process is killed stays, and keeps every descriptor: what may
// wait for a device is done by a child (package aside).
//
// Detach with an opener. The nbd driver fails the requests of whoever still has the device open,
// and a mounted filesystem turns into errors. So detach is refused with ErrDeviceBusy while there
// is an opener.
//
// A thread that waits for its own device. When the process is killed, a thread that waits in the
// kernel for a request to a device of ours (a first open, fsync, umount, a resize where that freezes the
// queue) cannot end, so no descriptor of the process is closed: the kernel does not see that
// the device has lost its server, no successor gets the locks, and the request is never answered.
// So no thread of this process may wait so. Children may: see package aside.
//
// Nobody serves. Between the death of one process and the reconnect by the next, requests for an
// nbd device wait in the driver, and they hold the queue: resize, freeze, del_gendisk and an open
// that reads (the first one, for the partition table) wait behind them, for as long as
// DeadConnTimeout. Resize asks Health first; an attach opens the device once, so that later
// opens read nothing; Clean writes nothing back.
//
// Probes. udev and blkid open a device after each change of it, and after a descriptor that could
// write is closed. We open for reading only, and detach waits for probes that are under way.
//
// # Kernel notes
//
// nbd, Linux 6.1.192 (Debian's cloud kernel, in the virtual machine of test/kernel):
//
//   - CONNECT without an index takes the lowest free one, and makes new devices beyond the 16 of nbds_max.
//   - io_timeout is in /sys/block/nbdN/queue; CONNECT with TIMEOUT 0 leaves it at 30 s. At 1 s the driver prints
//     "Possible stuck request" for whatever takes longer, and does nothing else while the socket is the same.
//   - A RECONFIGURE with SIZE_BYTES grows a mounted device with requests under way.
//   - After the ioctl NBD_DISCONNECT by another program the identifier stays in sysfs until a netlink DISCONNECT;
//     the device is dead, not gone, and every open scans for partitions, with I/O errors in the kernel's log.
//   - With a dead socket and no disconnect, an open reads nothing and does not wait.
//   - RECONFIGURE takes a socket only for one that is marked dead, and says success in any case. When it has taken
//     none, the server's end has ended as soon as our copy of the client's end is closed: that is looked at.
//   - A process that is killed holds its sockets until its last thread is gone: then the kernel marks them dead.
//   - A request that was under way at a kill is resent at the next look after a reconnect, 2.0 s apart with an
//     io_timeout of 1 s: the kernel adds a second, rounded up to a power of two of its ticks. A process that ends in
//     order sets it to 1 ms before: looks are 1.0 s apart then, and log every request that is under way.
//   - Requests that were under way at a kill never fail by themselves, only by a DISCONNECT (see Abandon). Those that
//     have waited for DEAD_CONN_TIMEOUT fail, and so does every later one. That is not shown in
//     sysfs or by STATUS; a reconnect would succeed after it. So the time is noted (see served).
//   - All netlink commands of all families that have no lock of their own wait for each other. A RECONFIGURE with
//     SIZE_BYTES that waits for the queue (in kernels that freeze it) would keep a reconnect from getting through.
//   - There is no WRITE_ZEROES: mkfs.xfs writes out the zeroes of its log, 64 MiB by default.
//
// loop over FUSE, Linux 6.18:
//
//   - Direct I/O works on it and is asynchronous with FUSE_ASYNC_DIO and FOPEN_PARALLEL_DIRECT_WRITES.
//   - PUNCH_HOLE means a discard or zeroes that may be unmapped: it must leave zeroes. EOPNOTSUPP for it makes
//     the driver write zeroes out and give up discards, until the device is set up again.
//   - queue/discard_max_bytes, once written, stays with the loop device after LOOP_CLR_FD, for its next user. After 0
//     it takes nothing else (EINVAL): only LOOP_CTL_REMOVE helps.
//   - LOOP_CLR_FD with other openers succeeds and only marks the device autoclear; LOOP_SET_STATUS64 takes the mark off.
//   - LOOP_GET_STATUS64 asks the file system of the backing file, and fails or hangs with it; sysfs does not.
//   - The FUSE driver drops the size of a GETATTR when a write has ended since it asked. LOOP_SET_CAPACITY takes
//     the new size from the answer all the same, and reads behind the size that the inode has fail.
//   - The backing file of a detached mount keeps its name in sysfs, without the directories above.
//   - When the last copy of the FUSE descriptor is closed, requests fail at once with ENOTCONN, and unmounting the
//     filesystem on top works. Until then they wait, those that were read too.
//   - A process that is being killed gets no page brought in: a request whose copy needs one ends with EIO.
//
// ext4 grows while mounted only for a process with CAP_SYS_RESOURCE.
package nbdexport
