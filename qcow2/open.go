package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"csi-qcow2/cache"
)

// lastSerial is the serial of the image that was opened last.
var lastSerial atomic.Uint64

// Open opens the image in f. On success the image owns f and Close closes it.
//
// What a predecessor of the same ID left in the cache is written back first. Then
// an image that was not closed (Options.Unclean, or its dirty bit is set) is
// repaired, unless it is opened read-only. If the image had failed in the
// predecessor, it is failed in this process too, until it was closed.
//
// When Open fails, what the predecessor left waits for another Open.
//
// Errors: ErrNotQcow2, ErrUnsupported, ErrCorrupt (a *FormatError says where),
// and those of f.
func Open(ctx context.Context, f File, opts Options) (*Image, error) {
	if opts.Snapshot != "" && !opts.ReadOnly {
		return nil, fmt.Errorf("%w: snapshot %q must be opened read-only", ErrReadOnly, opts.Snapshot)
	}
	if opts.NoFlush {
		f = unsyncedFile{f}
	}
	h, err := readHeader(f)
	if err != nil {
		return nil, err
	}
	im := &Image{f: f, opts: opts, geo: h.geometry(), version: h.version, hdr: h, epochs: newEpochs(), making: make(chan struct{}, maxMaking), serial: lastSerial.Add(1)}
	if named, ok := f.(interface{ Name() string }); ok {
		im.name = named.Name()
	}
	if err := im.openCache(); err != nil {
		return nil, err
	}
	if err := im.open(ctx); err != nil {
		err = errors.Join(err, im.handle.Abandon())
		if im.own != nil {
			err = errors.Join(err, im.own.Close())
		}
		return nil, err
	}
	return im, nil
}

// open is Open once the image has its handle of the cache.
func (im *Image) open(ctx context.Context) error {
	if err := im.claimLeft(); err != nil {
		return err
	}
	tables := im.f
	switch {
	case im.failed() != nil:
		tables = cachedFile{im.f, im.handle, int64(im.geo.sliceBytes)}
	case !im.opts.ReadOnly:
		if err := im.makeConsistent(ctx); err != nil {
			return err
		}
	}
	if err := validateTables(tables, im.hdr); err != nil {
		return err
	}
	if err := im.readTables(tables); err != nil {
		return err
	}
	if err := im.openBacking(ctx); err != nil || im.opts.ReadOnly || im.failed() != nil {
		return err
	}
	if err := im.reserveTables(); err != nil {
		if b := im.base(); b != nil {
			err = errors.Join(err, b.Close())
		}
		return err
	}
	return nil
}

// makeConsistent finishes what a predecessor left: it writes back the tables
// that are in the cache, repairs what an unclean end explains, and stamps the
// image. An image whose corrupt bit is set is refused.
func (im *Image) makeConsistent(ctx context.Context) error {
	var err error
	if im.handle.DirtyTables() > 0 {
		if err := im.handle.WriteBack(); err != nil {
			return err
		}
		if im.hdr, err = readHeader(im.f); err != nil {
			return err
		}
	}
	if im.hdr.corrupt() {
		return fmt.Errorf("%w: its corrupt bit is set; it can be opened read-only, or repaired with: csi-qcow2 img check -r all", ErrCorrupt)
	}
	if im.hdr.dirty() || im.opts.Unclean {
		if err := im.repair(ctx); err != nil {
			return err
		}
	}
	return im.setStamp(true)
}

// repair repairs an image that was not closed: everything when the dirty bit
// says that refcounts and COPIED flags may be off, else leaks, and then a
// corruption has another cause and is not touched. The cache is emptied around
// it: the repair changes tables in the file.
func (im *Image) repair(ctx context.Context) error {
	if err := im.handle.Close(); err != nil {
		return err
	}
	res, err := checkFile(ctx, im.f, im.hdr, CheckOptions{RepairLeaks: true, RepairAll: im.hdr.dirty(), beyondEnd: true})
	if err == nil {
		im.hdr, err = readHeader(im.f)
	}
	if err == nil && (im.hdr.dirty() || res.Corruptions > 0 || res.CheckErrors > 0) {
		err = fmt.Errorf("%w: %d corruptions and %d parts that cannot be read; copy the image, then run: csi-qcow2 img check -r all",
			ErrCorrupt, res.Corruptions, res.CheckErrors)
	}
	if oerr := im.openHandle(); oerr != nil {
		return errors.Join(err, oerr)
	}
	if err != nil {
		return fmt.Errorf("qcow2: repair after an unclean end: %w", err)
	}
	return nil
}

// readTables reads from f the tables that stay in memory whole, and picks the
// L1 table of the snapshot that was asked for.
func (im *Image) readTables(f File) error {
	h, g := im.hdr, &im.geo
	records, bytes, err := readSnapshotTableSize(f, h)
	if err != nil {
		return err
	}
	im.records, im.recordsBytes = records, bytes
	size, l1Off, l1Size := int64(h.size), h.l1Offset, int(h.l1Size)
	if im.opts.Snapshot != "" {
		i, err := findSnapshot(records, im.opts.Snapshot)
		if err != nil {
			return err
		}
		r := &records[i]
		size, l1Off, l1Size = int64(r.diskSize), r.l1Offset, int(r.l1Size)
		if int64(l1Size) < g.l1EntriesFor(size) {
			return corruptf("snapshot L1 table", l1Off, "%d entries do not cover %d bytes", l1Size, size)
		}
	}
	entries, err := readTable(f, "L1 table", l1Off, l1Size)
	if err != nil {
		return err
	}
	im.l1.Store(newL1Table(l1Off, entries))
	im.size.Store(size)
	if im.opts.ReadOnly {
		return nil // refcounts are not looked at
	}
	reftable, err := readTable(f, "refcount table", h.refcountTableOffset, int(int64(h.refcountTableClusters)*g.clusterSize/entryBytes))
	if err != nil {
		return err
	}
	fileSize, err := im.f.Size()
	if err != nil {
		return fmt.Errorf("qcow2: size of the image file: %w", err)
	}
	im.allocator.init(g, h.refcountTableOffset, reftable, fileSize)
	return im.guardTables()
}

func (im *Image) openBacking(ctx context.Context) error {
	if im.hdr.backingName == "" {
		return nil
	}
	if im.opts.OpenBacking == nil {
		return fmt.Errorf("%w: the image has a backing file, %q, and none may be opened", ErrUnsupported, im.hdr.backingName)
	}
	backing, err := im.opts.OpenBacking(ctx, im.hdr.backingName, im.hdr.backingFormat)
	if err != nil {
		return fmt.Errorf("qcow2: backing file %q: %w", im.hdr.backingName, err)
	}
	im.backing.Store(&backing)
	return nil
}

// openCache opens a handle of the cache that was given, or of a private one.
func (im *Image) openCache() error {
	if im.opts.Cache == nil {
		own, err := cache.New(cache.Options{Bytes: DefaultCacheBytes})
		if err != nil {
			return err
		}
		im.opts.Cache, im.own = own, own
	}
	err := im.openHandle()
	if err != nil && im.own != nil {
		err = errors.Join(err, im.own.Close())
	}
	return err
}

func (im *Image) openHandle() error {
	handle, err := im.opts.Cache.Open(&tableFile{im.f}, cache.HandleOptions{ID: im.opts.ID, SliceBytes: im.geo.sliceBytes, Classes: classCount})
	if err == nil {
		im.handle = handle
	}
	return err
}

// tableFile is the image file as the cache sees it: a table that lies beyond the
// end of the file is corrupt, and what the file does not hold of one is zero.
type tableFile struct{ File }

func (t *tableFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := t.File.ReadAt(p, off)
	switch {
	case n == len(p):
		return n, nil
	case n == 0 && errors.Is(err, io.EOF):
		return 0, corruptf("table", HostOffset(off), "it lies beyond the end of the file")
	case errors.Is(err, io.EOF):
		clear(p[n:])
		return len(p), nil
	}
	return n, err
}

// unsyncedFile is a file that is never synced.
type unsyncedFile struct{ File }

func (unsyncedFile) Datasync() error { return nil }

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
func (im *Image) Info() Info {
	im.hdrMu.Lock()
	h := *im.hdr
	im.hdrMu.Unlock()
	info := Info{
		Version:         int(h.version),
		VirtualSize:     im.size.Load(),
		ClusterSize:     im.geo.clusterSize,
		RefcountBits:    int(im.geo.refcountBits),
		LazyRefcounts:   h.compatible&compatLazyRefcounts != 0,
		Dirty:           h.dirty(),
		Corrupt:         h.corrupt(),
		ExtendedL2:      h.incompatible&incompatExtL2 != 0,
		CompressionType: "zlib",
		BackingFile:     h.backingName,
		BackingFormat:   h.backingFormat,
		Snapshots:       im.Snapshots(),
	}
	if h.compressionType == compressionZstd {
		info.CompressionType = "zstd"
	}
	if size, err := im.f.Size(); err == nil {
		info.FileSize = size
	}
	return info
}

// L1TableOf returns where the L1 table of the internal snapshot id (an ID, or
// else a name) lies, and how many entries it has: what a header overlay needs.
func (im *Image) L1TableOf(id string) (off HostOffset, entries int, err error) {
	records := im.snapshots()
	i, err := findSnapshot(records, id)
	if err != nil {
		return 0, 0, err
	}
	return records[i].l1Offset, int(records[i].l1Size), nil
}
