package main

import (
	"math"
	"strings"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
	"csi-qcow2/qcow2/convert"
)

var imgMeasureSyntax = imgSyntax{short: "hf:l:o:O:U", long: map[string]string{
	"help": "h", "output": "output:", "size": "size:", "force-share": "U",
}}

// imgMeasure is "img measure".
func imgMeasure(c *imgContext, args []string) error {
	opts, operands, err := imgMeasureSyntax.parse(args)
	if err != nil {
		return err
	}
	var lists []string
	var share bool
	format, outFormat, snapshot, output, size := "", "raw", "", "human", int64(-1)
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			format = o.arg
		case "l":
			snapshot, err = c.parseSnapshotParam(o.arg)
		case "o":
			if !validOptionList(o.arg) {
				return imgErrorf("Invalid option list: %s", o.arg)
			}
			lists = append(lists, o.arg)
		case "O":
			outFormat = o.arg
		case "U":
			share = true
		case "output":
			output = o.arg
		case "size":
			size, err = c.imgSize(o.arg, "image size", math.MaxInt64)
		}
		if err != nil {
			return err
		}
	}
	asJSON, err := imgOutput(output)
	switch {
	case err != nil:
		return err
	case len(operands) > 1:
		return imgErrorf("At most one filename argument is allowed.")
	case len(operands) == 0 && (format != "" || snapshot != ""):
		return imgErrorf("--image-opts, -f, and -l require a filename argument.")
	case len(operands) == 0 && size < 0:
		return imgErrorf("Either --size N or one filename must be specified.")
	case len(operands) == 1 && size >= 0:
		return imgErrorf("--size N cannot be used together with a filename.")
	}
	t, err := newImgTarget("", outFormat, strings.Join(lists, ","), "", "")
	if err != nil {
		if imgParams[outFormat] != nil {
			c.errorf("%v", err)
			return imgErrorf("Invalid options for file format '%s'", outFormat)
		}
		return err
	}
	m := measurement{size: size}
	if len(operands) == 1 {
		v := imgConversion{format: format, snapshot: snapshot, share: share}
		if err := m.source(c, &v, operands[0], t); err != nil {
			return err
		}
	} else if n, ok := t.params.size("size"); ok && size < 0 {
		m.size = n
	}
	if err := m.reckon(t); err != nil {
		return err
	}
	m.print(c, asJSON)
	return nil
}

// A measurement is what a new image would need.
type measurement struct {
	size, data              int64 // of the source: virtual size, bytes of clusters with data
	bitmaps                 bool  // the source could have bitmaps, which qemu-img counts
	required, fullAllocated int64
}

// source takes the size and the data of an image.
func (m *measurement) source(c *imgContext, v *imgConversion, name string, t *imgTarget) (err error) {
	disk, err := v.openOne(c, name, imagefile.CacheWriteback)
	if err != nil {
		return err
	}
	defer closeImage(disk, &err)
	m.size = disk.Size()
	if im, ok := disk.(*qcow2.Image); ok {
		m.bitmaps = im.Info().Version >= 3
	}
	if t.params.format == "raw" {
		return nil
	}
	o, err := t.createOptions()
	if err != nil {
		return err
	}
	m.data, err = convert.Allocated(c, disk, o.ClusterSize)
	if err != nil {
		return imgErrorf("%s", imgText(err))
	}
	return nil
}

// reckon computes what the target needs.
func (m *measurement) reckon(t *imgTarget) error {
	if t.params.format == "raw" {
		size := (m.size + 511) &^ 511
		m.required, m.fullAllocated, m.bitmaps = size, size, false
		return nil
	}
	o, err := t.createOptions()
	if err != nil {
		return err
	}
	m.bitmaps = m.bitmaps && o.Version >= 3
	m.required, m.fullAllocated = qcow2.Measure(m.size, m.data, o)
	return nil
}

func (m *measurement) print(c *imgContext, asJSON bool) {
	if asJSON {
		o := map[string]any{"required": m.required, "fully-allocated": m.fullAllocated}
		if m.bitmaps {
			o["bitmaps"] = 0
		}
		c.printf("%s\n", imgJSON(o))
		return
	}
	c.printf("required size: %d\nfully allocated size: %d\n", m.required, m.fullAllocated)
	if m.bitmaps {
		c.printf("bitmaps size: 0\n")
	}
}
