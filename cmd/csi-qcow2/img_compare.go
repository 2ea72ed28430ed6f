package main

import (
	"errors"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2/convert"
)

// Exit codes of "img compare" beyond 0, the images are equal.
const (
	compareDiffer = 1
	compareFailed = 2
)

var imgCompareSyntax = imgSyntax{short: "hf:F:T:pqsU", long: map[string]string{"help": "h", "force-share": "U"}}

// imgCompare is "img compare".
func imgCompare(c *imgContext, args []string) error {
	opts, operands, err := imgCompareSyntax.parse(args)
	if err != nil {
		return err
	}
	var quiet, strict, share, progress bool
	formats, cacheMode := [2]string{}, "writeback"
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			formats[0] = o.arg
		case "F":
			formats[1] = o.arg
		case "T":
			cacheMode = o.arg
		case "p":
			progress = true
		case "q":
			quiet = true
		case "s":
			strict = true
		case "U":
			share = true
		}
	}
	if len(operands) != 2 {
		return imgUsagef("Expecting two image file names")
	}
	if err := c.compare(operands, formats, cacheMode, share, strict, quiet, progress && !quiet); err != nil {
		e := &imgError{text: err.Error()}
		errors.As(err, &e)
		if e.code == 0 {
			e.code = compareFailed
		}
		return e
	}
	return nil
}

func (c *imgContext) compare(names []string, formats [2]string, cacheMode string, share, strict, quiet, progress bool) (err error) {
	mode, err := imgCacheMode(cacheMode, "source ")
	if err != nil {
		return err
	}
	a, _, err := c.open(names[0], imagefile.Options{Format: formats[0], ReadOnly: true, CacheMode: mode, ForceShare: share})
	if err != nil {
		return err
	}
	defer closeImage(a, &err)
	b, _, err := c.open(names[1], imagefile.Options{Format: formats[1], ReadOnly: true, CacheMode: mode, ForceShare: share})
	if err != nil {
		return err
	}
	defer closeImage(b, &err)

	say := func(format string, args ...any) {
		if !quiet {
			c.printf(format+"\n", args...)
		}
	}
	bar := newImgProgress(c.stdout, progress, max(a.Size(), b.Size()))
	defer bar.end()
	d, err := convert.Compare(c, a, b, convert.CompareOptions{Strict: strict, Progress: bar.update})
	if err != nil {
		return imgErrorf("%s", imgText(err))
	}
	if d.Kind == convert.Equal {
		bar.update(bar.total)
	}
	if a.Size() != b.Size() && !strict && (d.Kind == convert.Equal || d.Off >= min(a.Size(), b.Size())) {
		say("Warning: Image size mismatch!")
	}
	switch d.Kind {
	case convert.ContentDiffer:
		say("Content mismatch at offset %d!", d.Off)
	case convert.SizeDiffer:
		say("Strict mode: Image size mismatch!")
	case convert.StatusDiffer:
		say("Strict mode: Offset %d block status mismatch!", d.Off)
	default:
		say("Images are identical.")
		return nil
	}
	return imgExit(compareDiffer)
}
