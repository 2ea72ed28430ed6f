package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/bits"
)

// CreateOptions describe a new image. The zero value of each field means its default.
type CreateOptions struct {
	Version         int    // 3 (default) or 2
	ClusterSize     int64  // bytes, a power of two from 512 to 2 MiB; default 64 KiB
	RefcountBits    int    // 1, 2, 4, … 64; default 16
	LazyRefcounts   bool   // version 3 only
	CompressionType string // "zlib" (default) or "zstd"
	BackingFile     string // name to record, at most 1023 bytes
	BackingFormat   string // "qcow2" or "raw"; required with BackingFile
	Preallocation   Preallocation
}

// A Preallocation says how much of a new image is allocated at once.
type Preallocation string

// The values of Preallocation.
const (
	PreallocationOff      Preallocation = "off"      // default
	PreallocationMetadata Preallocation = "metadata" // all tables; host clusters assigned, not written
	PreallocationFalloc   Preallocation = "falloc"   // and space reserved with fallocate
	PreallocationFull     Preallocation = "full"     // and zeroes written
)

// Create writes a new image of size bytes (virtual, rounded up to 512) into
// the empty file f and makes it durable. The caller keeps f.
//
// The header is written last, after everything else is durable: a crash
// leaves either a whole image or a file that is not qcow2.
func Create(ctx context.Context, f File, size int64, o CreateOptions) error {
	return CreateHead(ctx, f, size, o, nil)
}

// CreateHead is Create of a disk that begins with head, and has zeroes up to the
// end of head's last cluster: data of its own, in front of what a backing file shows.
func CreateHead(ctx context.Context, f File, size int64, o CreateOptions, head []byte) error {
	o = o.withDefaults()
	if err := o.validate(); err != nil {
		return err
	}
	if size < 0 || size > maxVirtualSize {
		return fmt.Errorf("%w: size %d; use 0 to %d", ErrTooLarge, size, int64(maxVirtualSize))
	}
	if n, err := f.Size(); err != nil {
		return err
	} else if n != 0 {
		return fmt.Errorf("qcow2: the file for a new image holds %d bytes; truncate it first", n)
	}
	size = (size + 511) &^ 511
	if int64(len(head)) > size {
		return fmt.Errorf("qcow2: %d bytes to begin a disk of %d bytes with: make the disk larger", len(head), size)
	}
	allocated := int64(len(head))
	if o.Preallocation != PreallocationOff {
		allocated = size
	}
	h := o.header(size)
	l, err := newLayout(h.geometry(), size, allocated)
	if err != nil {
		return err
	}
	h.l1Size = uint32(l.l1Entries)
	h.l1Offset = l.g.hostOffset(l.l1)
	h.refcountTableOffset = l.g.hostOffset(l.reftable)
	h.refcountTableClusters = uint32(l.reftableClusters)
	cluster, err := h.encodeCluster()
	if err != nil {
		return err
	}

	if err := f.Truncate(int64(l.g.hostOffset(l.end))); err != nil {
		return err
	}
	if err := l.writeTables(ctx, f); err != nil {
		return err
	}
	if err := l.preallocateData(ctx, f, o.Preallocation); err != nil {
		return err
	}
	if len(head) > 0 {
		if _, err := f.WriteAt(head, int64(l.g.hostOffset(l.data))); err != nil {
			return err
		}
	}
	if err := f.Datasync(); err != nil {
		return err
	}
	// The rest of the cluster is zeroes already, and stays sparse.
	used := (len(bytes.TrimRight(cluster, "\x00")) + 4095) &^ 4095
	if _, err := f.WriteAt(cluster[:min(used, len(cluster))], 0); err != nil {
		return err
	}
	return f.Datasync()
}

// withDefaults returns o with its zero fields set.
func (o CreateOptions) withDefaults() CreateOptions {
	if o.Version == 0 {
		o.Version = 3
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = 1 << defaultClusterBits
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 1 << defaultRefcountOrder
	}
	if o.CompressionType == "" {
		o.CompressionType = "zlib"
	}
	if o.Preallocation == "" {
		o.Preallocation = PreallocationOff
	}
	return o
}

// validate returns every problem of o, which has its defaults set.
func (o CreateOptions) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("qcow2: "+format, args...)) }
	if o.Version != 2 && o.Version != 3 {
		bad("version %d: use 2 or 3", o.Version)
	}
	if o.ClusterSize < 1<<minClusterBits || o.ClusterSize > 1<<maxClusterBits || o.ClusterSize&(o.ClusterSize-1) != 0 {
		bad("cluster size %d: use a power of two from %d to %d", o.ClusterSize, 1<<minClusterBits, 1<<maxClusterBits)
	}
	if o.RefcountBits < 1 || o.RefcountBits > 1<<maxRefcountOrder || o.RefcountBits&(o.RefcountBits-1) != 0 {
		bad("refcount width %d: use 1, 2, 4, 8, 16, 32 or 64 bits", o.RefcountBits)
	}
	switch o.CompressionType {
	case "zlib", "zstd":
	default:
		bad("compression type %q: use zlib or zstd", o.CompressionType)
	}
	if o.Version == 2 {
		if o.RefcountBits != 1<<defaultRefcountOrder {
			bad("refcount width %d needs version 3: use 16 bits or version 3", o.RefcountBits)
		}
		if o.LazyRefcounts {
			bad("lazy refcounts need version 3: leave them off or use version 3")
		}
		if o.CompressionType != "zlib" {
			bad("compression type %q needs version 3: use zlib or version 3", o.CompressionType)
		}
	}
	switch {
	case len(o.BackingFile) > maxBackingName:
		bad("backing file name of %d bytes: use at most %d", len(o.BackingFile), maxBackingName)
	case o.BackingFile == "" && o.BackingFormat != "":
		bad("backing format %q without a backing file: name the file too", o.BackingFormat)
	case o.BackingFile != "" && o.BackingFormat != "qcow2" && o.BackingFormat != "raw":
		bad("backing format %q: use qcow2 or raw", o.BackingFormat)
	}
	switch o.Preallocation {
	case PreallocationOff:
	case PreallocationMetadata, PreallocationFalloc, PreallocationFull:
		if o.BackingFile != "" {
			bad("preallocation %q would hide the backing file: use off", o.Preallocation)
		}
	default:
		bad("preallocation %q: use off, metadata, falloc or full", o.Preallocation)
	}
	return errors.Join(errs...)
}

// header returns the header of a new image without its tables.
func (o CreateOptions) header(size int64) *header {
	h := &header{
		version:       uint32(o.Version),
		clusterBits:   uint(bits.TrailingZeros64(uint64(o.ClusterSize))),
		size:          uint64(size),
		refcountOrder: uint(bits.TrailingZeros(uint(o.RefcountBits))),
		headerLength:  headerBytesV2,
		backingName:   o.BackingFile,
		backingFormat: o.BackingFormat,
	}
	if h.version == 2 {
		return h
	}
	h.headerLength = headerBytesV3Known
	if o.LazyRefcounts {
		h.compatible |= compatLazyRefcounts
	}
	if o.CompressionType == "zstd" {
		h.compressionType = compressionZstd
		h.incompatible |= incompatCompression
	}
	// As QEMU: in a small cluster the space is better left to a backing file name.
	if o.ClusterSize > 4096 {
		h.extensions = []headerExtension{{extFeatureNames, encodeFeatureNames(featureNames())}}
	}
	return h
}
