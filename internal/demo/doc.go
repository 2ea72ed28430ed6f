// Package demo plays a Kubernetes node against the node agent, on this
// machine: it starts `csi-qcow2 node` on an empty pool, speaks CSI to it over
// its unix socket as kubelet and the sidecars do, and holds what comes out
// against checksums, against the kernel, and against QEMU's own tools. It
// shares no code with the driver: whatever it says was seen from outside.
//
// # Support
//
// Linux, as root. Filesystems ext4 and XFS; raw block volumes; kernel nbd
// devices and FUSE+loop devices. It needs the programs of the set "demo" in
// hack/packages.
//
// # Terms
//
// The stage directory is where everything of one run lies: the pool, the
// socket, the mount points. A step is a title with a function; a check is one
// thing that must hold. A leftover is a mount, loop device, nbd device or
// process that still belongs to the stage directory.
//
// # Concurrency
//
// The steps run one after another. The only other goroutines are the writer
// of a snapshot step, which the step ends and waits for, and the one that
// waits for the node agent's exit.
//
// # Failure
//
// The first check that does not hold ends the run, as does a cancelled
// context. In every case the stage directory is struck: first through CSI
// (unpublish, unstage), newest mount first, then by ending the agent, and what
// is then still there by force, which counts as a failure of its own. At last
// the kernel is asked whether anything is left. All of it is bounded in time.
//
// # Spec
//
// Container Storage Interface v1.13.0.
package demo
