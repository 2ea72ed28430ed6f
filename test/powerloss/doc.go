// Package powerloss cuts the power of a machine whose pool lies on a real
// filesystem: the filesystem's block device is a simulated disk that knows which
// of its writes are durable. What an operation of the pool has acknowledged must
// be there after any such cut (P2, P4, P8), directory entries included (edge E9),
// on ext4 and on XFS.
package powerloss
