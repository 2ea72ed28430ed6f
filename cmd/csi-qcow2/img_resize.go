package main

import (
	"context"
	"errors"
	"math"
	"strings"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

var imgResizeSyntax = imgSyntax{short: "f:hq", long: map[string]string{
	"help": "h", "preallocation": "preallocation:", "shrink": "shrink",
}}

// imgResize is "img resize".
func imgResize(c *imgContext, args []string) error {
	// The size comes off first: "-1G" is no option.
	if len(args) < 3 {
		for _, arg := range args[1:] {
			if arg == "-h" || arg == "--help" {
				return c.help()
			}
		}
		return imgUsagef("Not enough arguments")
	}
	size := args[len(args)-1]
	opts, operands, err := imgResizeSyntax.parse(args[:len(args)-1])
	if err != nil {
		return err
	}
	format, shrink, quiet, mode := "", false, false, qcow2.PreallocationOff
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			format = o.arg
		case "q":
			quiet = true
		case "preallocation":
			mode = qcow2.Preallocation(o.arg)
			switch mode {
			case qcow2.PreallocationOff, qcow2.PreallocationMetadata, qcow2.PreallocationFalloc, qcow2.PreallocationFull:
			default:
				return imgErrorf("Invalid preallocation mode '%s'", o.arg)
			}
		case "shrink":
			shrink = true
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting image file name and size")
	}
	if err := c.resize(operands[0], format, size, mode, shrink); err != nil {
		return err
	}
	if !quiet {
		c.printf("Image resized.\n")
	}
	return nil
}

// resize changes the virtual size of the image name to size, which is relative
// with a sign.
func (c *imgContext) resize(name, format, size string, mode qcow2.Preallocation, shrink bool) (err error) {
	sign := int64(0)
	number := size
	switch {
	case strings.HasPrefix(size, "+"):
		sign, number = 1, size[1:]
	case strings.HasPrefix(size, "-"):
		sign, number = -1, size[1:]
	}
	n, perr := (&imgParam{name: "size", kind: paramSize}).canonical(number)
	if perr != nil {
		return perr
	}
	amount, perr := parseSize(n)
	if perr != nil || amount > math.MaxInt64 {
		return imgErrorf("New image size must be less than 8 EiB")
	}
	disk, _, err := c.open(name, imagefile.Options{Format: format, Discard: true})
	if err != nil {
		return err
	}
	defer closeImage(disk, &err)
	old, total := disk.Size(), int64(amount)
	if sign != 0 {
		if sign > 0 && total > math.MaxInt64-old {
			return imgErrorf("New image size must be less than 8 EiB")
		}
		total = old + sign*total
	}
	switch {
	case total <= 0:
		return imgErrorf("New image size must be positive")
	case total < old && mode != qcow2.PreallocationOff:
		return imgErrorf("Preallocation can only be used for growing images")
	case total < old && !shrink:
		c.errorf("Use the --shrink option to perform a shrink operation.")
		return imgErrorf("warning: Shrinking an image will delete all data beyond the shrunken image's end. " +
			"Before performing such an operation, make sure there is no important data there.")
	}
	if im, ok := disk.(*qcow2.Image); ok {
		return c.resizeQcow2(im, old, total, mode)
	}
	return c.resizeRaw(disk, old, total, mode)
}

func (c *imgContext) resizeQcow2(im *qcow2.Image, old, size int64, mode qcow2.Preallocation) error {
	switch {
	case size%512 != 0:
		return imgErrorf("The new size must be a multiple of 512")
	case size < old:
		return imgErrorf("Shrinking a qcow2 image is not supported; convert it to a smaller image instead")
	case mode != qcow2.PreallocationOff:
		return imgErrorf("Unsupported preallocation mode '%s': a qcow2 image can only grow without it", mode)
	}
	if err := im.Resize(c, size); err != nil {
		return imgErrorf("%s", imgText(err))
	}
	return nil
}

// resizeRaw gives new space of a raw image what mode says. A raw disk that was
// probed is behind a guard, so that only its methods are known.
func (c *imgContext) resizeRaw(disk qcow2.Disk, old, size int64, mode qcow2.Preallocation) error {
	if mode == qcow2.PreallocationMetadata {
		return imgErrorf("Unsupported preallocation mode: %s", mode)
	}
	raw, ok := disk.(interface {
		Resize(ctx context.Context, size int64) error
		File() qcow2.File
	})
	if !ok {
		return imgErrorf("Image format driver does not support resize")
	}
	err := raw.Resize(c, size)
	if err == nil && size > old {
		if err = preallocateRaw(c, raw.File(), old, size, mode); err != nil {
			// What there was room for goes back, whoever interrupted us.
			err = errors.Join(err, raw.Resize(context.WithoutCancel(c), old))
		}
	}
	if errors.Is(err, errors.ErrUnsupported) {
		return imgErrorf("Unsupported preallocation mode: %s", mode)
	}
	if err != nil {
		return imgErrorf("%s", imgText(err))
	}
	return disk.Flush()
}
