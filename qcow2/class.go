package qcow2

import "csi-qcow2/cache"

// tableClass orders the tables in a write back: flush.go says why.
type tableClass = cache.Class

// The classes of tables, lowest first. The tables of a class are written after
// those of lower classes that were changed before them are durable.
const (
	classRefblock tableClass = iota // refcount blocks
	classReftable                   // the refcount table
	classL2                         // L2 tables, active and of snapshots
	classL1                         // L1 tables and the snapshot table
	classCount    = iota
)
