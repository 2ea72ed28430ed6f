package qcow2

import (
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxBounceBytes bounds the buffer of an unaligned direct request.
const maxBounceBytes = 1 << 20

// directAlignment returns what direct I/O on fd demands. Kernels before 6.1 do
// not say; a page is enough for every file system and device in use.
func directAlignment(fd int) (mem uintptr, block int64) {
	var stx unix.Statx_t
	err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	if err != nil || stx.Mask&unix.STATX_DIOALIGN == 0 || stx.Dio_offset_align == 0 {
		return bufferAlign, bufferAlign
	}
	return uintptr(max(stx.Dio_mem_align, 1)), int64(stx.Dio_offset_align)
}

// alignedFor reports whether a direct request needs no bounce buffer.
func (f *OSFile) alignedFor(p []byte, off int64) bool {
	if len(p) == 0 {
		return true
	}
	return (off|int64(len(p)))&(f.blockAlign-1) == 0 && uintptr(unsafe.Pointer(&p[0]))&(f.memAlign-1) == 0
}

// readBounced reads [off, off+len(p)) through an aligned buffer.
func (f *OSFile) readBounced(p []byte, off int64) (int, error) {
	buf := GetBuffer(int(min(int64(len(p))+2*f.blockAlign, maxBounceBytes)))
	defer PutBuffer(buf)
	room := int64(len(buf)) &^ (f.blockAlign - 1)
	done := 0
	for done < len(p) {
		at := off + int64(done)
		start := at &^ (f.blockAlign - 1)
		end := min(f.alignUp(off+int64(len(p))), start+room)
		n, err := f.pread(buf[:end-start], start)
		if err != nil && err != io.EOF {
			return done, err
		}
		skip := int(at - start)
		if n <= skip {
			return done, io.EOF
		}
		done += copy(p[done:], buf[skip:n])
		if err == io.EOF && done < len(p) {
			return done, io.EOF
		}
	}
	return done, nil
}

// writeBounced writes p at off by reading, changing and writing whole blocks.
func (f *OSFile) writeBounced(p []byte, off int64) (int, error) {
	f.rmw.Lock()
	defer f.rmw.Unlock()
	oldSize, err := f.Size()
	if err != nil {
		return 0, err
	}
	buf := GetBuffer(int(min(int64(len(p))+2*f.blockAlign, maxBounceBytes)))
	defer PutBuffer(buf)
	room := int64(len(buf)) &^ (f.blockAlign - 1)
	done := 0
	for done < len(p) {
		at := off + int64(done)
		start := at &^ (f.blockAlign - 1)
		end := min(f.alignUp(off+int64(len(p))), start+room)
		b := buf[:end-start]
		if err := f.fillEdges(b, start, at, off+int64(len(p))); err != nil {
			return done, err
		}
		n := copy(b[at-start:], p[done:])
		if _, err := f.pwrite(b, start); err != nil {
			return done, err
		}
		done += n
	}
	// The last block may have made the file longer than the request did.
	newSize := max(oldSize, off+int64(len(p)))
	if f.alignUp(off+int64(len(p))) > newSize {
		if err := f.Truncate(newSize); err != nil {
			return done, err
		}
	}
	return done, nil
}

// fillEdges reads those blocks of b, whose first byte lies at start, that a
// write of [from, to) changes only in part.
func (f *OSFile) fillEdges(b []byte, start, from, to int64) error {
	end := start + int64(len(b))
	if from > start {
		if err := f.fill(b[:f.blockAlign], start); err != nil {
			return err
		}
	}
	if last := end - f.blockAlign; to < end && (last > start || from == start) {
		return f.fill(b[last-start:], last)
	}
	return nil
}

// fill reads b at off, zeroes beyond the end of the file.
func (f *OSFile) fill(b []byte, off int64) error {
	n, err := f.pread(b, off)
	if err != nil && err != io.EOF {
		return err
	}
	clear(b[n:])
	return nil
}

func (f *OSFile) alignUp(n int64) int64 { return (n + f.blockAlign - 1) &^ (f.blockAlign - 1) }
