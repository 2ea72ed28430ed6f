// Package driver serves the Container Storage Interface over the volumes of one
// or more pools: it translates between CSI and packages volume and nbdexport,
// and brings volumes from an image to a mounted filesystem or a raw device. It
// is the only place that knows gRPC codes. It decides nothing about the content
// of a pool and nothing about the format of an image.
//
// # Support
//
//	Identity     all
//	Controller   CreateVolume, DeleteVolume, ValidateVolumeCapabilities, ListVolumes, GetCapacity,
//	             CreateSnapshot, DeleteSnapshot, ListSnapshots, ControllerExpandVolume;
//	             alpha: GetSnapshot, ControllerGetVolume, ControllerGetVolumeHealth, ControllerListVolumeHealth
//	Group        CreateVolumeGroupSnapshot, DeleteVolumeGroupSnapshot, GetVolumeGroupSnapshot
//	Node         all GA; alpha: NodeGetVolumeHealth, NodeGetStorageHealth
//	Publish      not needed on the controller: a volume lives on its node
//	Access       SINGLE_NODE_WRITER, SINGLE_NODE_READER_ONLY, SINGLE_NODE_SINGLE_WRITER, SINGLE_NODE_MULTI_WRITER
//	Filesystems  ext4 (default), xfs
//	SnapshotMetadata  all (alpha), VARIABLE_LENGTH; a delta also between snapshots of a volume and of its clones
//	Not offered  ControllerModifyVolume: answered UNIMPLEMENTED
//
// # Terms
//
// A staged volume is an open image attached as a device, and mounted at its
// staging path unless it is a block volume. It is lost when its device has no
// server any more. A hint is a file in the run directory that says what a
// predecessor of this process had staged; the kernel's mounts and devices are
// the truth.
//
// # Concurrency
//
// One RPC changes a volume at a time; a second is answered ABORTED at once. A
// change that has begun is finished when its caller goes away. Lock order:
//
//	keyLock(volume ID)   held for a whole change
//	  Driver.mu          the table of staged volumes; never held over a call down
//	  the locks of packages volume and nbdexport
//	Driver.thawMu        what is thawed in the background; a leaf, over the removal of a record
//
// # Durability / Failure
//
// A snapshot of a mounted filesystem, and the clone of one, is cut while the
// filesystem is frozen: at most 30 s, and thawed whatever happens (see freeze.go).
//
// Each step of stage, publish, unpublish and unstage compares what is with what
// shall be: an RPC can be repeated, by this process or the next. A failed stage
// is undone; when undoing fails as well the code is ABORTED, which promises
// nothing. mkfs runs only on a volume that this driver made empty and that
// nobody has written to, with a record of the intent before and of the success
// after; the look of a device never decides (see format.go).
//
// After a restart of the process the kernel still has the devices of the
// predecessor. Restore opens their images and serves them again, if nothing that
// was written is lost: not without the predecessor's cache, and not when requests
// may have failed meanwhile. Volumes that cannot be restored are reported by the
// health RPCs; staging again repairs them: the dead mounts are detached, the
// device is removed when nothing holds it, and a new one is attached.
//
// A write that waits for space in a pool (see pause.go) is left to the next process
// when this one ends in order, and waits anew.
//
// No thread waits for a device that this process serves: a process with such a
// thread cannot die. See package aside.
//
// # Spec
//
// Container Storage Interface v1.13.0, github.com/container-storage-interface/spec.
package driver
