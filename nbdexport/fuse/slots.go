package fuse

import (
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"os"

	"golang.org/x/sys/unix"
)

// ErrSlots reports that slots cannot be gone on with: they are damaged, of
// another version of this program, or another process serves them.
var ErrSlots = errors.New("fuse: slots")

var errSlotsVersion = fmt.Errorf("%w: version", ErrSlots)

// slotsHeader is the first page of the file of slots, in the byte order of the machine. The
// slots follow it. Fields up to the checksum never change; the rest is zero.
//
//	Offset  Size  Field     Meaning
//	     0     8  magic     "csiqfuse"
//	     8     4  version   1
//	    12     4  count     number of slots
//	    16     4  data      bytes of data in each slot: the most in one READ or WRITE
//	    20     4            0
//	    24     8  canary    random
//	    32     4  checksum  CRC-32C of bytes 0 to 31
//	    36     4  empty     1 when a process has stopped and left no request in a slot
type slotsHeader struct {
	count  uint32
	data   uint32
	canary uint64
}

const (
	slotsMagic      = "csiqfuse"
	slotsVersion    = 1
	slotsHeaderSize = 36 // bytes, with the checksum
	slotsEmpty      = 36 // offset

	maxSlots    = 64
	maxSlotData = 1 << 20 // bytes, in any version
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode writes h into b, which holds at least slotsHeaderSize bytes.
func (h *slotsHeader) encode(b []byte) {
	copy(b, slotsMagic)
	wire.PutUint32(b[8:], slotsVersion)
	wire.PutUint32(b[12:], h.count)
	wire.PutUint32(b[16:], h.data)
	wire.PutUint32(b[20:], 0)
	wire.PutUint64(b[24:], h.canary)
	wire.PutUint32(b[32:], crc32.Checksum(b[:32], castagnoli))
}

// decodeSlotsHeader decodes and checks b, which holds at least a page.
func decodeSlotsHeader(b []byte) (slotsHeader, error) {
	h := slotsHeader{count: wire.Uint32(b[12:]), data: wire.Uint32(b[16:]), canary: wire.Uint64(b[24:])}
	switch version := wire.Uint32(b[8:]); {
	case string(b[:8]) != slotsMagic || wire.Uint32(b[32:]) != crc32.Checksum(b[:32], castagnoli):
		return h, fmt.Errorf("%w: the header is damaged", ErrSlots)
	case version != slotsVersion:
		return h, fmt.Errorf("%w %d, this program knows %d; stop the other version with SIGTERM before its successor starts", errSlotsVersion, version, slotsVersion)
	case !h.valid():
		return h, fmt.Errorf("%w: %d slots of %d bytes", ErrSlots, h.count, h.data)
	}
	return h, nil
}

// valid reports whether h describes slots that a version of this program may have made.
func (h *slotsHeader) valid() bool {
	return h.count >= 1 && h.count <= maxSlots && h.data >= pageSize && h.data <= maxSlotData && h.data%pageSize == 0
}

func (h *slotsHeader) slotSize() int   { return pageSize + int(h.data) }
func (h *slotsHeader) fileSize() int64 { return pageSize + int64(h.count)*int64(h.slotSize()) }

// slots is the file of slots of one mount, in memory.
type slots struct {
	slotsHeader
	file *os.File
	mem  []byte
}

// newSlots makes a file of empty slots. No memory is used before a slot is.
func newSlots(count, data int) (*slots, error) {
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	h := slotsHeader{count: uint32(count), data: uint32(data), canary: wire.Uint64(random[:])}
	fd, err := unix.MemfdCreate("csi-qcow2 fuse slots", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), "fuse slots")
	// Sealed: nobody who gets the descriptor can pull the memory away below us.
	err = unix.Ftruncate(fd, h.fileSize())
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	s, err := mapSlots(file, h)
	if err != nil {
		return nil, err
	}
	h.encode(s.mem)
	return s, nil
}

// openSlots maps the slots that another process made. It owns file.
func openSlots(file *os.File) (*slots, error) {
	page := make([]byte, pageSize)
	_, err := file.ReadAt(page, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", ErrSlots, err), file.Close())
	}
	h, err := decodeSlotsHeader(page)
	if errors.Is(err, errSlotsVersion) && wire.Uint32(page[slotsEmpty:]) == 1 && h.valid() {
		file.Close() // it was only read
		// Nothing is in them: new ones do as well. The kernel was told how much data it may send.
		return newSlots(maxReaders, int(h.data))
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	info, err := file.Stat()
	if err == nil && info.Size() != h.fileSize() {
		err = fmt.Errorf("%w: %d bytes, want %d", ErrSlots, info.Size(), h.fileSize())
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return mapSlots(file, h)
}

// mapSlots claims and maps file, which it owns.
func mapSlots(file *os.File, h slotsHeader) (*slots, error) {
	fd := file.Fd()
	// The lock belongs to the process, and goes with its last thread: whoever gets it knows
	// that no system call of a killed predecessor is under way.
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(fd, unix.F_SETLK, &lock); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: another process serves them: %w", ErrSlots, err), file.Close())
	}
	mem, err := unix.Mmap(int(fd), 0, int(h.fileSize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mmap: %w", err), file.Close())
	}
	return &slots{slotsHeader: h, file: file, mem: mem}, nil
}

// slot returns slot i, in memory and locked there.
func (s *slots) slot(i int) (*slot, error) {
	off := pageSize + i*s.slotSize()
	mem := s.mem[off : off+s.slotSize() : off+s.slotSize()]
	if err := unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
		// Before Linux 5.14. A write to each page does the same, when nobody else writes.
		if !errors.Is(err, unix.EINVAL) {
			return nil, fmt.Errorf("populate a slot: %w", err)
		}
		for page := 0; page < len(mem); page += pageSize {
			mem[page+pageSize/2] += 0
		}
	}
	// Where locking is not allowed, the pages stay as long as memory is not short.
	if err := unix.Mlock(mem); err != nil && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOMEM) && !errors.Is(err, unix.EAGAIN) {
		return nil, fmt.Errorf("lock a slot: %w", err)
	}
	return &slot{mem: mem, canary: s.canary}, nil
}

// peek returns slot i as it is, to look at it.
func (s *slots) peek(i int) *slot {
	off := pageSize + i*s.slotSize()
	return &slot{mem: s.mem[off : off+s.slotSize()], canary: s.canary}
}

// setEmpty notes whether a successor may ignore what is in the slots.
func (s *slots) setEmpty(empty bool) {
	var v uint32
	if empty {
		v = 1
	}
	wire.PutUint32(s.mem[slotsEmpty:], v)
}

func (s *slots) close() error { return errors.Join(unix.Munmap(s.mem), s.file.Close()) }
