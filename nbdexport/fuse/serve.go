package fuse

import (
	"bytes"
	"errors"

	"golang.org/x/sys/unix"
)

// serve executes and answers the request in the slot, whose header is h. Of one that was
// executed by a predecessor it sends the answer.
func (r *reader) serve(h inHeader) {
	if !r.whole(h) {
		r.reply(h.unique, uint32(unix.EIO), 0) // the kernel has ended it with EIO itself
		return
	}
	r.touch(int(h.len) - (slotData - slotRequest))
	body := r.body(h.len)
	switch h.opcode {
	case opRead:
		r.read(h, body)
	case opWrite, opFallocate:
		errno, done := r.finished(h.unique)
		if !done {
			if h.opcode == opWrite {
				errno = r.write(body)
			} else {
				errno = r.fallocate(body)
			}
			if r.left {
				return
			}
			r.reach(atExecuted)
			r.finish(h.unique, errno)
			r.reach(atFinished)
		}
		if h.opcode == opFallocate || errno != 0 {
			r.reply(h.unique, errno, 0)
			return
		}
		out := r.replyBody()[:writeOutSize]
		clear(out)
		wire.PutUint32(out, decodeIOIn(body).size)
		r.reply(h.unique, 0, writeOutSize)
	case opFsync:
		err := r.file.Flush()
		r.reach(atExecuted)
		r.reply(h.unique, uint32(errnoOf(err)), 0)
	case opForget, opBatchForget: // they have no answer
	default:
		errno, size := r.look(h, body)
		r.reply(h.unique, uint32(errno), size)
	}
}

// read executes and answers READ, which the loop driver sends for every read of the device.
func (r *reader) read(h inHeader, body []byte) {
	if len(body) < ioInSize {
		r.reply(h.unique, uint32(unix.EINVAL), 0)
		return
	}
	in := decodeIOIn(body)
	if h.nodeID != fileNode || int64(in.size) > int64(len(r.data())) {
		r.reply(h.unique, uint32(unix.EINVAL), 0)
		return
	}
	n := int(r.clip(in.off, uint64(in.size)))
	data := r.data()[:n]
	r.touch(n)
	if n > 0 {
		if _, err := r.file.ReadAt(data, int64(in.off)); err != nil {
			r.reply(h.unique, uint32(errnoOf(err)), 0)
			return
		}
	}
	r.reach(atExecuted)
	r.replyData(h.unique, n)
}

// write executes WRITE, which the loop driver sends for every write of the device.
func (r *reader) write(body []byte) (errno uint32) {
	if len(body) < ioInSize {
		return uint32(unix.EINVAL)
	}
	in := decodeIOIn(body)
	data := body[ioInSize:]
	if int64(in.size) != int64(len(data)) {
		return uint32(unix.EINVAL)
	}
	if errno := r.writable(in.off, uint64(in.size)); errno != 0 || in.size == 0 {
		return errno
	}
	_, err := r.file.WriteAt(data, int64(in.off))
	return r.result(err)
}

// fallocate executes FALLOCATE, which the loop driver sends for discards and for zeroes: it makes PUNCH_HOLE of
// both when the zeroes may be unmapped. So a hole must read as zeroes. Where discards are
// not wanted the hole is refused, and the kernel writes the zeroes out instead.
func (r *reader) fallocate(body []byte) (errno uint32) {
	if len(body) < fallocateInSize {
		return uint32(unix.EINVAL)
	}
	in := decodeFallocateIn(body)
	if errno := r.writable(in.off, in.length); errno != 0 {
		return errno
	}
	hole := in.mode&^unix.FALLOC_FL_KEEP_SIZE == unix.FALLOC_FL_PUNCH_HOLE
	zero := in.mode&^unix.FALLOC_FL_KEEP_SIZE == unix.FALLOC_FL_ZERO_RANGE
	if !zero && !(hole && r.opts.Discard) {
		return uint32(unix.EOPNOTSUPP)
	}
	if in.length == 0 {
		return 0
	}
	return r.result(r.file.WriteZeroes(int64(in.off), int64(in.length), hole))
}

// result is the error number of a change, unless that is left.
func (r *reader) result(err error) (errno uint32) {
	r.left = errors.Is(err, ErrUnanswered)
	return uint32(errnoOf(err))
}

// clip returns how many of the n bytes at off are inside the file.
func (c *Conn) clip(off, n uint64) uint64 {
	size := uint64(c.size.Load())
	if off >= size {
		return 0
	}
	return min(n, size-off)
}

// writable checks a change of the n bytes at off.
func (c *Conn) writable(off, n uint64) (errno uint32) {
	size := uint64(c.size.Load())
	switch {
	case c.opts.ReadOnly:
		return uint32(unix.EROFS)
	case off > size || n > size-off:
		return uint32(unix.EFBIG)
	}
	return 0
}

// look executes a request that changes nothing and moves no data. Its answer is size bytes of replyBody.
func (r *reader) look(h inHeader, body []byte) (errno unix.Errno, size int) {
	out := r.replyBody()
	switch h.opcode {
	case opInit:
		return r.init(body, out)
	case opLookup: // for every path walk through the mount
		name, _, ok := bytes.Cut(body, []byte{0})
		if !ok || h.nodeID != rootNode || string(name) != r.opts.Name {
			return unix.ENOENT, 0
		}
		clear(out[:entryOutSize])
		wire.PutUint64(out, fileNode)
		r.attr(fileNode).encode(out[entryOutSize-attrSize:])
		return 0, entryOutSize
	case opGetattr: // for every stat, and by the loop driver to learn the size
		if h.nodeID != rootNode && h.nodeID != fileNode {
			return unix.ENOENT, 0
		}
		clear(out[:attrOutSize])
		r.attr(h.nodeID).encode(out[attrOutSize-attrSize:])
		return 0, attrOutSize
	case opSetattr: // truncation and the like: the size is the server's
		return unix.EPERM, 0
	case opOpen: // by the maker of the loop device, once
		if len(body) < openInSize {
			return unix.EINVAL, 0
		}
		if r.opts.ReadOnly && wire.Uint32(body)&unix.O_ACCMODE != unix.O_RDONLY {
			return unix.EROFS, 0
		}
		clear(out[:openOutSize])
		wire.PutUint32(out[8:], openDirectIO|openParallelWrites)
		return 0, openOutSize
	case opOpendir: // people look at the mount
		clear(out[:openOutSize])
		return 0, openOutSize
	case opReaddir:
		return r.readdir(body, out)
	case opStatfs: // df, and the loop driver to learn the granularity of discards
		clear(out[:statfsSize])
		wire.PutUint64(out, uint64(r.size.Load())/BlockSize)
		wire.PutUint32(out[40:], BlockSize)
		wire.PutUint32(out[44:], maxName)
		wire.PutUint32(out[48:], BlockSize)
		return 0, statfsSize
	case opFsyncdir, opFlush, opRelease, opReleasedir, opDestroy: // FLUSH is of a descriptor that is closed
		return 0, 0
	}
	return unix.ENOSYS, 0
}

// init executes INIT, the first request of a mount.
func (r *reader) init(body, out []byte) (errno unix.Errno, size int) {
	if len(body) < initInSize {
		return unix.EINVAL, 0
	}
	if major, minor := wire.Uint32(body), wire.Uint32(body[4:]); major != protocolMajor || minor < minMinor {
		return unix.EPROTO, 0
	}
	o := initOut{
		flags:      wire.Uint32(body[12:]) & (initAsyncRead | initBigWrites | initAsyncDIO | initMaxPages),
		background: background,
		maxWrite:   r.slots.data,
	}
	o.encode(out)
	return 0, initOutSize
}

func (c *Conn) attr(node uint64) attr {
	switch {
	case node == rootNode:
		return attr{ino: node, mode: unix.S_IFDIR | 0o500, nlink: 2}
	case c.opts.ReadOnly:
		return attr{ino: node, mode: unix.S_IFREG | 0o400, nlink: 1, size: uint64(c.size.Load())}
	}
	return attr{ino: node, mode: unix.S_IFREG | 0o600, nlink: 1, size: uint64(c.size.Load())}
}

// readdir lists the one file.
func (r *reader) readdir(body, out []byte) (errno unix.Errno, size int) {
	if len(body) < ioInSize {
		return unix.EINVAL, 0
	}
	in := decodeIOIn(body)
	n := (direntSize + len(r.opts.Name) + 7) &^ 7
	if in.off != 0 || int64(in.size) < int64(n) {
		return 0, 0
	}
	clear(out[:n])
	wire.PutUint64(out, fileNode)
	wire.PutUint64(out[8:], 1)
	wire.PutUint32(out[16:], uint32(len(r.opts.Name)))
	wire.PutUint32(out[20:], unix.S_IFREG>>12)
	copy(out[direntSize:], r.opts.Name)
	return 0, n
}
