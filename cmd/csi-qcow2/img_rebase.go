package main

import (
	"context"

	"csi-qcow2/internal/imagefile"
)

var imgRebaseSyntax = imgSyntax{short: "hf:F:b:upt:T:qU", long: map[string]string{"help": "h", "force-share": "U"}}

// imgRebase is "img rebase". Only the unsafe form is supported: it changes the
// name of the backing file and nothing else.
func imgRebase(c *imgContext, args []string) (err error) {
	opts, operands, err := imgRebaseSyntax.parse(args)
	if err != nil {
		return err
	}
	var format, backing, backingFormat string
	cacheMode, sourceCache, unsafe := "writeback", "writeback", false
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			format = o.arg
		case "F":
			backingFormat = o.arg
		case "b":
			backing = o.arg
		case "u":
			unsafe = true
		case "t":
			cacheMode = o.arg
		case "T":
			sourceCache = o.arg
		case "p", "q", "U": // nothing is copied, nothing is printed, no source is opened
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting one image file name")
	}
	if !unsafe {
		return imgErrorf("Only unsafe rebasing (-u) is supported; to change the backing file and keep the content, convert the image with -B")
	}
	mode, err := imgCacheMode(cacheMode, "")
	if err != nil {
		return err
	}
	if _, err := imgCacheMode(sourceCache, "source "); err != nil {
		return err
	}
	disk, _, err := c.open(operands[0], imagefile.Options{Format: format, CacheMode: mode, NoBacking: true})
	if err != nil {
		return err
	}
	defer closeImage(disk, &err)
	im, ok := disk.(interface {
		SetBacking(ctx context.Context, name, format string) error
	})
	switch {
	case backingFormat != "" && backingFormat != "qcow2" && backingFormat != "raw":
		return imgErrorf("Invalid format name: '%s'", backingFormat)
	case backing != "" && backingFormat == "":
		return imgErrorf("Could not change the backing file to '%s': backing format must be specified", backing)
	case !ok:
		return imgErrorf("Could not change the backing file to '%s': Operation not supported", backing)
	case len(backing) > 1023:
		return imgErrorf("Could not change the backing file to '%s': Invalid argument", backing)
	}
	if err := im.SetBacking(c, backing, backingFormat); err != nil {
		return imgErrorf("Could not change the backing file to '%s': %s", backing, imgText(err))
	}
	return nil
}
