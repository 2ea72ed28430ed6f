package qcow2

import (
	"context"
	"time"

	"csi-qcow2/cache"
)

// Options say how Open opens an image. The zero value opens read-write with a
// private cache and without its backing file.
type Options struct {
	// ReadOnly opens without writing anything, not even a repair.
	ReadOnly bool
	// Snapshot, if not "", opens the internal snapshot with this ID, or else
	// this name, instead of the active state. It requires ReadOnly.
	Snapshot string
	// Cache is the metadata cache to use; nil makes a private one of
	// DefaultCacheBytes that Close releases.
	Cache *cache.Cache
	// OpenBacking opens the backing file that the header names. Nil refuses
	// images that have a backing file, with ErrUnsupported. The image closes
	// what it returns.
	OpenBacking BackingOpener
	// PassDiscard gives the space of freed clusters back to the host file.
	PassDiscard bool
	// NoFlush makes Flush return at once: cache=unsafe of the tools.
	NoFlush bool
}

// DefaultCacheBytes is the budget of a private cache.
const DefaultCacheBytes = 32 << 20

// A BackingOpener opens the backing file name, whose format the header gives
// as "qcow2", "raw" or "" (not recorded).
type BackingOpener func(ctx context.Context, name, format string) (Disk, error)

// An Image is an open qcow2 image. It implements Disk.
type Image struct{}

// Open opens the image in f. On success the image owns f and Close closes it.
//
// An image whose dirty bit is set is repaired first, unless it is opened
// read-only. Errors: ErrNotQcow2, ErrUnsupported, ErrCorrupt (a *FormatError
// says where), and those of f.
func Open(ctx context.Context, f File, opts Options) (*Image, error) { panic("unwritten") }

// Close flushes, frees what waits to be freed, and closes the file and its
// backing chain. It waits for requests under way.
func (im *Image) Close() error { panic("unwritten") }

// ReadAt implements Disk.
func (im *Image) ReadAt(p []byte, off int64) (int, error) { panic("unwritten") }

// WriteAt implements Disk.
func (im *Image) WriteAt(p []byte, off int64) (int, error) { panic("unwritten") }

// WriteZeroes implements Disk.
func (im *Image) WriteZeroes(off, n int64, unmap bool) error { panic("unwritten") }

// Discard implements Disk.
func (im *Image) Discard(off, n int64) error { panic("unwritten") }

// Flush implements Disk.
func (im *Image) Flush() error { panic("unwritten") }

// BlockStatus implements Disk.
func (im *Image) BlockStatus(ctx context.Context, off, n int64) (Extent, error) { panic("unwritten") }

// Size implements Disk.
func (im *Image) Size() int64 { panic("unwritten") }

// WriteCompressed stores one whole guest cluster compressed, or as WriteAt
// when it does not shrink. off must be a multiple of the cluster size, and p
// one cluster, or the shorter rest of the disk. Only for images that nothing
// else writes: it is meant for conversions.
func (im *Image) WriteCompressed(p []byte, off int64) error { panic("unwritten") }

// Resize changes the virtual size, up only. The change is durable when it returns.
func (im *Image) Resize(ctx context.Context, size int64) error { panic("unwritten") }

// A Snapshot describes an internal snapshot.
type Snapshot struct {
	ID          string // unique in the image
	Name        string
	Date        time.Time
	VMStateSize int64         // bytes
	VMClock     time.Duration // guest run time
	ICount      int64         // -1 if not recorded
	DiskSize    int64         // virtual size when it was taken, bytes
}

// Snapshots lists the internal snapshots in table order.
func (im *Image) Snapshots() []Snapshot { panic("unwritten") }

// CreateSnapshot takes an internal snapshot: all writes that returned before
// the call are in it, none that starts after it has returned. It is durable
// when it returns. An empty s.ID gets the next free decimal number, as QEMU
// numbers them; a zero Date is now.
func (im *Image) CreateSnapshot(ctx context.Context, s Snapshot) (Snapshot, error) {
	panic("unwritten")
}

// DeleteSnapshot removes the internal snapshot id (an ID, or else a name).
func (im *Image) DeleteSnapshot(ctx context.Context, id string) error { panic("unwritten") }

// ApplySnapshot makes the active state equal to the internal snapshot id (an
// ID, or else a name), its virtual size included. The snapshot stays.
func (im *Image) ApplySnapshot(ctx context.Context, id string) error { panic("unwritten") }

// SetBacking rewrites the backing file name and format in the header
// (rebase -u): the content of clusters that are unallocated changes with it.
func (im *Image) SetBacking(ctx context.Context, name, format string) error { panic("unwritten") }

// Info describes the image as `qemu-img info` does.
type Info struct {
	Version         int   // 2 or 3
	VirtualSize     int64 // bytes
	ClusterSize     int64 // bytes
	RefcountBits    int
	LazyRefcounts   bool
	Dirty           bool
	Corrupt         bool
	ExtendedL2      bool
	CompressionType string // "zlib" or "zstd"
	BackingFile     string
	BackingFormat   string
	Snapshots       []Snapshot
	FileSize        int64 // bytes of the host file
}

// Info returns a description of the image.
func (im *Image) Info() Info { panic("unwritten") }

// Check verifies the whole image; see CheckOptions. Writers wait while it runs.
func (im *Image) Check(ctx context.Context, o CheckOptions) (CheckResult, error) { panic("unwritten") }
