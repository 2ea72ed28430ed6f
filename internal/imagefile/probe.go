package imagefile

import (
	"bytes"
	"encoding/binary"
	"io"

	"csi-qcow2/qcow2"
)

// probeBytes is how much of a file decides about its format, as in QEMU.
const probeBytes = 512

// magics are the formats that QEMU would recognise. What is none of them is raw.
var magics = []struct {
	off    int
	magic  string
	format string
}{
	{0, "QFI\xfb\x00\x00\x00\x01", "qcow"},
	{0, "QED\x00", "qed"},
	{0, "LUKS\xba\xbe", "luks"},
	{0, "KDMV", "vmdk"},
	{0, "COWD", "vmdk"},
	{0, "# Disk DescriptorFile", "vmdk"},
	{0, "conectix", "vpc"},
	{0, "vhdxfile", "vhdx"},
	{0x40, "\x7f\x10\xda\xbe", "vdi"},
	{0, "WithoutFreeSpace", "parallels"},
	{0, "WithouFreSpacExt", "parallels"},
	{0, "Bochs Virtual HD Image", "bochs"},
	{0, "#!/bin/sh\n#V2.0 Format\n", "cloop"},
}

// formatOf returns the format of an image whose first bytes are b.
func formatOf(b []byte) string {
	if len(b) >= 8 && string(b[:4]) == "QFI\xfb" && binary.BigEndian.Uint32(b[4:]) >= 2 {
		return "qcow2"
	}
	for _, m := range magics {
		if len(b) > m.off && bytes.HasPrefix(b[m.off:], []byte(m.magic)) {
			return m.format
		}
	}
	return "raw"
}

// probe returns the format of the image in f.
func probe(f qcow2.File, name string) (string, error) {
	var b [probeBytes]byte
	n, err := f.ReadAt(b[:], 0)
	if err != nil && err != io.EOF {
		return "", err
	}
	format := formatOf(b[:n])
	if format != "qcow2" && format != "raw" {
		return "", &FormatError{Name: name, Format: format, Probed: true}
	}
	return format, nil
}

// A guardedRaw is a raw disk whose format was probed. Whoever writes its first
// sector must not be able to turn it into an image of another format, which a
// later probe would follow to any file of the host.
type guardedRaw struct{ *qcow2.Raw }

func (r *guardedRaw) WriteAt(p []byte, off int64) (int, error) {
	if off >= 0 && off < probeBytes && len(p) > 0 {
		var b [probeBytes]byte
		if r.Size() >= probeBytes {
			if _, err := r.ReadAt(b[:], 0); err != nil {
				return 0, err
			}
		}
		copy(b[off:], p)
		if formatOf(b[:]) != "raw" {
			return 0, ErrProbedHeader
		}
	}
	return r.Raw.WriteAt(p, off)
}
