package qcow2

import "context"

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
func Create(ctx context.Context, f File, size int64, o CreateOptions) error { panic("unwritten") }
