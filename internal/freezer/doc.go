// Package freezer freezes a mounted filesystem for a moment, by a process of its
// own, so that it is thawed whatever happens to the one that asked.
//
// FIFREEZE writes back what is dirty, and waits for the device for that; FITHAW
// writes, too. A process that serves the device itself must not wait for it (see
// package aside), and one that is killed between the two leaves a filesystem that
// nobody can write to. So the freezer, the same program started again, makes both
// calls and watches over the time between:
//
//	parent                        freezer
//	starts it                     opens the filesystem, FIFREEZE
//	                          <-  "frozen", or what went wrong
//	does its work
//	"thaw"                    ->  FITHAW
//	                          <-  "thawed"
//
// The freezer thaws by itself when its parent has ended, or has closed its end,
// and when the time limit has passed. Then Thaw says ErrExpired: what was
// done meanwhile may have been done on a filesystem in motion.
//
// # Support
//
//	Filesystems   those that the kernel can freeze: ext4, XFS, btrfs and others
//	A program     whose main calls Main first
//
// # Terms
//
// The limit is the time that a filesystem stays frozen at most, from the moment
// at which the freezer says so.
//
// # Concurrency
//
// Filesystems may be frozen from many goroutines at once; each has a freezer of
// its own. One goroutine is with each until it has ended.
//
// # Failure
//
// The kernel refuses to freeze what is frozen: ErrFrozen. That freeze is somebody
// else's and is left alone. Should the freezer be killed together with its parent,
// as in a container that ends, the filesystem stays frozen: the parent's successor
// calls ThawLeft for what its records say was being frozen.
//
// A freezer that is killed inside FIFREEZE, which waits for writers, and these for
// a device that nobody serves, goes on as soon as somebody does: it freezes, and
// ends without thawing. Meanwhile FITHAW says that nothing is frozen. So a freezer
// keeps a file locked until the kernel has done with it, and ThawLeft looks again
// after that.
//
// # Spec
//
// ioctl_fsfreeze of the kernel, fs/super.c of Linux 6: freeze_super, thaw_super.
package freezer
