package volume

import (
	"path"
	"time"
)

// The names below a pool. Everything variable in them is an ID of ours.
const (
	poolRecordName = "pool.json"
	lockName       = "lock"
	incomingDir    = "incoming"
	volumesDir     = "volumes"
	diskName       = "disk.qcow2"
	volumeRecName  = "volume.json"
	snapshotsDir   = "snapshots"
	viewsDir       = "views"
	groupsDir      = "groups"
)

func volumeDir(id string) string    { return path.Join(volumesDir, id) }
func incomingName(id string) string { return path.Join(incomingDir, id) }
func snapshotRecName(vol, id string) string {
	return path.Join(volumesDir, vol, snapshotsDir, id+".json")
}
func groupRecName(id string) string { return path.Join(groupsDir, id+".json") }
func viewName(v viewRef) string {
	return path.Join(volumesDir, v.Volume, viewsDir, v.Snapshot+".qcow2")
}

// Kinds and versions of the records. A version changes when an older program
// would misread the record; see package durable for the envelope.
const (
	poolKind        = "csi-qcow2 pool"
	volumeKind      = "csi-qcow2 volume"
	snapshotKind    = "csi-qcow2 snapshot"
	groupKind       = "csi-qcow2 group snapshot"
	poolVersion     = 1
	volumeVersion   = 1
	snapshotVersion = 1
	groupVersion    = 1
)

// A poolRecord marks a directory as a pool.
type poolRecord struct {
	UUID    string    `json:"uuid"` // 32 hexadecimal digits, random
	Created time.Time `json:"created"`
}

// A volumeRecord is what volume.json holds.
type volumeRecord struct {
	ID         string     `json:"id"`
	Name       string     `json:"name"` // CSI name
	Size       int64      `json:"size"` // virtual size, bytes; the image's header is the truth
	Params     Params     `json:"params"`
	Source     Source     `json:"source"`
	Created    time.Time  `json:"created"`
	Filesystem Filesystem `json:"filesystem"`
	Copy       Copy       `json:"copy,omitzero"`
	Revert     string     `json:"revert,omitempty"`     // ID of the snapshot that the volume is being reverted to
	RevertFrom uint64     `json:"revertFrom,omitempty"` // where the image's active L1 table was before that
	Open       bool       `json:"open,omitempty"`       // the image is open read-write, or its last user died
	Generation uint64     `json:"generation,omitempty"` // grows whenever the image is opened with nothing left of its last user
	Deleted    bool       `json:"deleted,omitempty"`    // tombstone
}

// A Copy says how far a volume of CloneCopy has come. A crash may make it say
// less than is true.
type Copy struct {
	Pending bool  `json:"pending,omitempty"` // it still needs its source
	Done    int64 `json:"done,omitempty"`    // bytes of the virtual disk, from its start, that do not need it any more
	Copied  int64 `json:"copied,omitempty"`  // bytes that were copied
}

// A snapshotRecord is what snapshots/<id>.json holds.
type snapshotRecord struct {
	ID         string        `json:"id"` // also the name of the internal snapshot
	Name       string        `json:"name,omitempty"`
	Volume     string        `json:"volume"`
	Size       int64         `json:"size"` // virtual size when it was taken, bytes
	Created    time.Time     `json:"created"`
	State      snapshotState `json:"state"` // of a member of a group, that of the group's record counts
	Hidden     bool          `json:"hidden,omitempty"`
	Group      string        `json:"group,omitempty"` // ID of the group snapshot that it is a member of
	Filesystem Filesystem    `json:"filesystem"`
}

// A groupRecord is what groups/<id>.json holds.
type groupRecord struct {
	ID        string        `json:"id"`
	Name      string        `json:"name"`
	Volumes   []string      `json:"volumes"`   // volume IDs, sorted
	Snapshots []string      `json:"snapshots"` // snapshot IDs, in the order of Volumes
	Created   time.Time     `json:"created"`
	State     snapshotState `json:"state"`

	damage error // why the rest is unknown; nil for a good record
}

// A snapshotState says how far a snapshot, or a group of them, is.
type snapshotState string

const (
	// snapshotCreating: the image may or may not hold it; nobody was told of it.
	snapshotCreating snapshotState = "creating"
	snapshotReady    snapshotState = "ready"
	// snapshotDeleted: a tombstone.
	snapshotDeleted snapshotState = "deleted"
)

// live reports whether users see the snapshot.
func (r *snapshotRecord) live() bool { return r.State == snapshotReady && !r.Hidden }

// A Source says what a volume was made from; the zero value is nothing.
type Source struct {
	Volume   string `json:"volume,omitempty"`   // volume ID, for a clone
	Snapshot string `json:"snapshot,omitempty"` // snapshot ID, for a restore
}

// Empty reports whether the volume was made from nothing.
func (s Source) Empty() bool { return s == Source{} }

// A Filesystem records what is known about the content of a volume. It decides
// whether a volume may be formatted; looking at the device never does.
type Filesystem struct {
	State FilesystemState `json:"state,omitempty"`
	Type  string          `json:"type,omitempty"` // "ext4" or "xfs" when formatting or formatted
}

// A FilesystemState is a step in the life of a volume's content.
type FilesystemState string

// The states of a filesystem. They only move down this list.
const (
	// FilesystemNone: nobody but this driver has written to the volume.
	FilesystemNone FilesystemState = ""
	// FilesystemFormatting: mkfs was started; the volume has not been mounted since.
	FilesystemFormatting FilesystemState = "formatting"
	// FilesystemFormatted: mkfs has ended well, and the volume may have been mounted.
	FilesystemFormatted FilesystemState = "formatted"
	// FilesystemForeign: the volume was exposed as a raw device: its content is the user's.
	FilesystemForeign FilesystemState = "foreign"
)
