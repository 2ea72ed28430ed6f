// Package sanity runs csi-test against the real node process, with real pools,
// devices, filesystems and mounts, in mount and in block mode. It needs root,
// /dev/fuse, /dev/loop-control, e2fsprogs and xfsprogs; what is missing fails the test.
//
// # Support
//
//	Suite   github.com/kubernetes-csi/csi-test v5.6, configured by NewTestConfig
//	Modes   mount and block, in one run
//	Skips   only the RPCs that the driver does not declare; each is listed, with its number
//
// # Concurrency
//
// One process per test, with a socket and directories of its own.
//
// # Failure
//
// Whatever happens, the process is ended, and mounts and loop devices of the
// test are removed; what had to be removed by force fails the test.
//
// # Spec
//
// Container Storage Interface v1.13.0.
package sanity
