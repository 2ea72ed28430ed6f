package cache

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
)

// header is the first 64 bytes of an arena file, little endian. It is written
// once, when the arena is made; the magic last, so that an arena whose making
// was cut short has none. The rest of its page has the marks.
//
//	Offset  Size  Field       Meaning
//	     0     8  magic       "csiqaren"
//	     8     4  layout      version of the header, the directory, the marks and the state word; 2
//	    12     4  slot_size   bytes; 4096
//	    16     8  slots       number of slots, a multiple of 8
//	    24    16  boot_id     of the kernel that runs; an arena does not survive a reboot
//	    40     8  generation  Options.Generation
//	    48    12  -           0
//	    60     4  crc         CRC-32C of bytes 0-59
type header struct {
	slots      uint64
	bootID     [16]byte
	generation uint64
}

const (
	headerMagic   = "csiqaren"
	headerLayout  = 2
	headerBytes   = 64
	headerWords   = headerBytes / 8
	maxArenaSlots = maxBytes / slotBytes
)

// errLayout is the error of decodeHeader for the header of another layout.
var errLayout = errors.New("another layout")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// decodeHeader decodes b, which holds headerBytes bytes. It checks form, not
// meaning: see (*header).validate.
func decodeHeader(b []byte) (header, error) {
	if string(b[0:8]) != headerMagic {
		return header{}, fmt.Errorf("magic %q, want %q", b[0:8], headerMagic)
	}
	// Before the checksum, which another layout may have elsewhere.
	if v := binary.LittleEndian.Uint32(b[8:]); v != headerLayout {
		return header{}, fmt.Errorf("%w: version %d, this program has %d", errLayout, v, headerLayout)
	}
	if got, want := binary.LittleEndian.Uint32(b[60:]), crc32.Checksum(b[:60], castagnoli); got != want {
		return header{}, fmt.Errorf("header checksum %#x, want %#x", got, want)
	}
	if n := binary.LittleEndian.Uint32(b[12:]); n != slotBytes {
		return header{}, fmt.Errorf("slots of %d bytes, want %d", n, slotBytes)
	}
	return header{
		slots:      binary.LittleEndian.Uint64(b[16:]),
		bootID:     [16]byte(b[24:40]),
		generation: binary.LittleEndian.Uint64(b[40:]),
	}, nil
}

// encode writes h into b, which holds headerBytes bytes.
func (h *header) encode(b []byte) {
	clear(b[:headerBytes])
	copy(b[0:8], headerMagic)
	binary.LittleEndian.PutUint32(b[8:], headerLayout)
	binary.LittleEndian.PutUint32(b[12:], slotBytes)
	binary.LittleEndian.PutUint64(b[16:], h.slots)
	copy(b[24:40], h.bootID[:])
	binary.LittleEndian.PutUint64(b[40:], h.generation)
	binary.LittleEndian.PutUint32(b[60:], crc32.Checksum(b[:60], castagnoli))
}

// validate returns an error if the arena is not one that this process may
// take over: want says what it expects, size is that of the file.
func (h *header) validate(want header, size int64) error {
	if h.slots == 0 || h.slots%ways != 0 || h.slots > maxArenaSlots {
		return fmt.Errorf("%d slots", h.slots)
	}
	if _, need := arenaLayout(int(h.slots)); size != need {
		return fmt.Errorf("file of %d bytes, want %d for %d slots", size, need, h.slots)
	}
	if h.bootID != want.bootID {
		return fmt.Errorf("boot ID %x, want %x: the machine was restarted since", h.bootID, want.bootID)
	}
	if h.generation != want.generation {
		return fmt.Errorf("generation %d, want %d", h.generation, want.generation)
	}
	return nil
}

// writeHeader publishes a new arena, whose directory is zero.
func (a *arena) writeHeader(h header) {
	var b [headerBytes]byte
	h.encode(b[:])
	for n := headerWords - 1; n >= 0; n-- {
		a.store(a.headerWord(n), binary.NativeEndian.Uint64(b[n*8:]))
	}
}

// readBootID returns the identity of the running kernel's boot.
func readBootID() (id [16]byte, err error) {
	const path = "/proc/sys/kernel/random/boot_id"
	b, err := os.ReadFile(path)
	if err != nil {
		return id, fmt.Errorf("cache: read boot ID: %w", err)
	}
	raw, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(b)), "-", ""))
	if err != nil || len(raw) != len(id) {
		return id, fmt.Errorf("cache: %s holds %q, which is not a UUID", path, b)
	}
	return [16]byte(raw), nil
}
