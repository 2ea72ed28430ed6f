package main

import (
	"bufio"
	"fmt"
	"math"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
	"csi-qcow2/qcow2/convert"
)

var imgMapSyntax = imgSyntax{short: "f:s:l:hU", long: map[string]string{
	"help": "h", "format": "f:", "output": "output:", "force-share": "U", "start-offset": "s:", "max-length": "l:",
}}

// imgMap is "img map".
func imgMap(c *imgContext, args []string) (err error) {
	opts, operands, err := imgMapSyntax.parse(args)
	if err != nil {
		return err
	}
	var share, asJSON bool
	format, output := "", "human"
	start, length := int64(0), int64(math.MaxInt64)
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			format = o.arg
		case "U":
			share = true
		case "output":
			output = o.arg
		case "s":
			start, err = c.imgSize(o.arg, "start offset", math.MaxInt64)
		case "l":
			length, err = c.imgSize(o.arg, "max length", math.MaxInt64)
		}
		if err != nil {
			return err
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting one image file name")
	}
	if asJSON, err = imgOutput(output); err != nil {
		return err
	}
	disk, _, err := c.open(operands[0], imagefile.Options{Format: format, ReadOnly: true, ForceShare: share})
	if err != nil {
		return err
	}
	defer closeImage(disk, &err)
	end := disk.Size()
	if length < end-start {
		end = start + length
	}
	w := bufio.NewWriter(c.stdout)
	defer w.Flush()
	if asJSON {
		return mapJSON(c, w, disk, start, end)
	}
	return mapHuman(c, w, disk, start, end)
}

// mapHuman lists the data of [start, end).
func mapHuman(c *imgContext, w *bufio.Writer, disk qcow2.Disk, start, end int64) error {
	fmt.Fprintf(w, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	for e, err := range convert.Extents(c, disk, start, end) {
		switch {
		case err != nil:
			return imgErrorf("Failed to read image metadata: %s", imgText(err))
		case e.Data && e.HostOff < 0:
			return imgErrorf("File contains external, encrypted or compressed clusters.")
		case e.Data && !e.Zero:
			fmt.Fprintf(w, "%#-16x%#-16x%#-16x%s\n", cHex(e.Off), cHex(e.Len), cHex(e.HostOff), e.File)
		}
	}
	return nil
}

// cHex formats a number as C's %#x does, where zero has no prefix.
type cHex int64

func (x cHex) Format(s fmt.State, verb rune) {
	text := "0"
	if x != 0 {
		text = fmt.Sprintf("%#x", int64(x))
	}
	width, _ := s.Width()
	fmt.Fprintf(s, "%-*s", width, text)
}

// mapJSON lists all of [start, end).
func mapJSON(c *imgContext, w *bufio.Writer, disk qcow2.Disk, start, end int64) error {
	fmt.Fprint(w, "[")
	separator := ""
	if start >= end {
		writeMapEntry(w, qcow2.Extent{Off: start, HostOff: -1})
	}
	for e, err := range convert.Extents(c, disk, start, end) {
		if err != nil {
			return imgErrorf("Failed to read image metadata: %s", imgText(err))
		}
		fmt.Fprint(w, separator)
		writeMapEntry(w, e)
		separator = ",\n"
	}
	fmt.Fprint(w, "]\n")
	return nil
}

func writeMapEntry(w *bufio.Writer, e qcow2.Extent) {
	fmt.Fprintf(w, `{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t`,
		e.Off, e.Len, e.Depth, e.Allocated, e.Zero, e.Data)
	if e.HostOff >= 0 {
		fmt.Fprintf(w, `, "offset": %d`, e.HostOff)
	}
	fmt.Fprint(w, "}")
}
