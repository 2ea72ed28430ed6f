package fuse

import "encoding/binary"

// wire is the byte order of the kernel; the protocol has that of the machine.
var wire = binary.NativeEndian

// An opcode says what a request asks for.
type opcode uint32

const (
	opLookup      opcode = 1
	opForget      opcode = 2
	opGetattr     opcode = 3
	opSetattr     opcode = 4
	opOpen        opcode = 14
	opRead        opcode = 15
	opWrite       opcode = 16
	opStatfs      opcode = 17
	opRelease     opcode = 18
	opFsync       opcode = 20
	opFlush       opcode = 25
	opInit        opcode = 26
	opOpendir     opcode = 27
	opReaddir     opcode = 28
	opReleasedir  opcode = 29
	opFsyncdir    opcode = 30
	opDestroy     opcode = 38
	opBatchForget opcode = 42
	opFallocate   opcode = 43
)

// protocolMajor and protocolMinor are what INIT answers: fields that are newer
// are not used. minMinor is the first with max_pages.
const (
	protocolMajor = 7
	protocolMinor = 31
	minMinor      = 28
)

// Flags of INIT.
const (
	initAsyncRead = 1 << 0
	initBigWrites = 1 << 5
	initAsyncDIO  = 1 << 15
	initMaxPages  = 1 << 22
)

// Flags of the answer to OPEN. A kernel ignores those it does not know.
const (
	openDirectIO       = 1 << 0
	openParallelWrites = 1 << 6 // since Linux 6.2
)

const (
	rootNode = 1
	fileNode = 2
)

// inHeader is the start of every request.
//
//	Offset  Size  Field     Meaning
//	     0     4  len       bytes of the request with its header
//	     4     4  opcode
//	     8     8  unique    number of the request; no number is used twice
//	    16     8  nodeid    what it is about
//	    24    12            uid, gid and pid of the caller
//	    36     4            length of extensions, which are not asked for; padding
//
// Spec: struct fuse_in_header.
type inHeader struct {
	len    uint32
	opcode opcode
	unique uint64
	nodeID uint64
}

const inHeaderSize = 40 // bytes

// decodeInHeader decodes b, which holds at least inHeaderSize bytes.
func decodeInHeader(b []byte) inHeader {
	return inHeader{len: wire.Uint32(b), opcode: opcode(wire.Uint32(b[4:])), unique: wire.Uint64(b[8:]), nodeID: wire.Uint64(b[16:])}
}

func (h *inHeader) encode(b []byte) {
	wire.PutUint32(b, h.len)
	wire.PutUint32(b[4:], uint32(h.opcode))
	wire.PutUint64(b[8:], h.unique)
	wire.PutUint64(b[16:], h.nodeID)
}

// ioIn is what READ and WRITE ask for. The data of a WRITE follows it.
//
//	Offset  Size  Field   Meaning
//	     0     8  fh      handle; always 0
//	     8     8  offset  in the file, in bytes
//	    16     4  size    bytes
//	    20    20          flags and owners of locks
//
// Spec: struct fuse_read_in, struct fuse_write_in.
type ioIn struct {
	off  uint64
	size uint32
}

const ioInSize = 40 // bytes

// decodeIOIn decodes b, which holds at least ioInSize bytes.
func decodeIOIn(b []byte) ioIn { return ioIn{off: wire.Uint64(b[8:]), size: wire.Uint32(b[16:])} }

func (in *ioIn) encode(b []byte) {
	wire.PutUint64(b[8:], in.off)
	wire.PutUint32(b[16:], in.size)
}

// fallocateIn is what FALLOCATE asks for.
//
//	Offset  Size  Field   Meaning
//	     0     8  fh      handle; always 0
//	     8     8  offset  in the file, in bytes
//	    16     8  length  bytes
//	    24     4  mode    FALLOC_FL_*
//	    28     4          padding
//
// Spec: struct fuse_fallocate_in.
type fallocateIn struct {
	off, length uint64
	mode        uint32
}

const fallocateInSize = 32 // bytes

// decodeFallocateIn decodes b, which holds at least fallocateInSize bytes.
func decodeFallocateIn(b []byte) fallocateIn {
	return fallocateIn{off: wire.Uint64(b[8:]), length: wire.Uint64(b[16:]), mode: wire.Uint32(b[24:])}
}

func (in *fallocateIn) encode(b []byte) {
	wire.PutUint64(b[8:], in.off)
	wire.PutUint64(b[16:], in.length)
	wire.PutUint32(b[24:], in.mode)
}

// The first fields of other requests:
//
//	INIT     0 major, 4 minor, 8 readahead, 12 flags
//	OPEN     0 flags of open(2)
//	READDIR  as READ
const (
	initInSize = 16 // bytes
	openInSize = 8
)

// encodeOutHeader encodes the start of every answer: errno is 0 or an error
// number, size the number of bytes that follow.
//
//	Offset  Size  Field   Meaning
//	     0     4  len     bytes of the answer with its header
//	     4     4  error   0, or an error number, negative
//	     8     8  unique  of the request
//
// Spec: struct fuse_out_header.
func encodeOutHeader(b []byte, unique uint64, errno uint32, size int) {
	wire.PutUint32(b, uint32(outHeaderSize+size))
	wire.PutUint32(b[4:], -errno)
	wire.PutUint64(b[8:], unique)
}

const outHeaderSize = 16 // bytes

// initOut answers INIT. The fields that are not named are zero.
//
//	Offset  Size  Field          Meaning
//	     0     4  major
//	     4     4  minor
//	     8     4  max_readahead  0: there is no page cache
//	    12     4  flags
//	    16     2  max_background requests that the kernel has under way without a waiter
//	    18     2  congestion     from how many on it calls that busy
//	    20     4  max_write      bytes of one WRITE
//	    24     4  time_gran      nanoseconds
//	    28     2  max_pages      of one request
//	    30    34
//
// Spec: struct fuse_init_out.
type initOut struct {
	flags      uint32
	background uint16
	maxWrite   uint32
}

const initOutSize = 64 // bytes

func (o *initOut) encode(b []byte) {
	clear(b[:initOutSize])
	wire.PutUint32(b, protocolMajor)
	wire.PutUint32(b[4:], protocolMinor)
	wire.PutUint32(b[12:], o.flags)
	wire.PutUint16(b[16:], o.background)
	wire.PutUint16(b[18:], o.background)
	wire.PutUint32(b[20:], o.maxWrite)
	wire.PutUint32(b[24:], 1)
	wire.PutUint16(b[28:], uint16(o.maxWrite/pageSize))
}

// attr describes the root or the file. The fields that are not named are zero.
//
//	Offset  Size  Field    Meaning
//	     0     8  ino
//	     8     8  size     bytes
//	    16    44           blocks and times
//	    60     4  mode
//	    64     4  nlink
//	    68    12           owner, device number
//	    80     4  blksize  bytes
//	    84     4           flags
//
// Spec: struct fuse_attr.
type attr struct {
	ino   uint64
	size  uint64
	mode  uint32
	nlink uint32
}

const (
	attrSize     = 88            // bytes
	attrOutSize  = 16 + attrSize // the answer to GETATTR: how long it is valid (not at all), then attr
	entryOutSize = 40 + attrSize // the answer to LOOKUP: nodeid, how long it is valid (not at all), then attr
	openOutSize  = 16            // the answer to OPEN: 8 flags
	writeOutSize = 8             // the answer to WRITE: 0 bytes written
	statfsSize   = 80            // the answer to STATFS: 0 blocks, 40 block size, 44 length of names, 48 fragment size
	direntSize   = 24            // in the answer to READDIR: 0 ino, 8 next offset, 16 length of name, 20 type; then the name
	maxReplySize = entryOutSize  // of the answers of a fixed size
)

func (a attr) encode(b []byte) {
	clear(b[:attrSize])
	wire.PutUint64(b, a.ino)
	wire.PutUint64(b[8:], a.size)
	wire.PutUint32(b[60:], a.mode)
	wire.PutUint32(b[64:], a.nlink)
	wire.PutUint32(b[80:], BlockSize)
}
