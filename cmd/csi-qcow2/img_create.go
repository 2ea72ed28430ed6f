package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

var imgCreateSyntax = imgSyntax{short: "F:b:f:ho:qu", long: map[string]string{"help": "h"}}

// imgCreate is "img create".
func imgCreate(c *imgContext, args []string) error {
	opts, operands, err := imgCreateSyntax.parse(args)
	if err != nil {
		return err
	}
	var (
		format                 = "raw"
		backing, backingFormat string
		lists                  []string
		quiet, unchecked       bool
		noBacking              bool // -b was given, without a name
	)
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "F":
			backingFormat = o.arg
		case "b":
			backing, noBacking = o.arg, o.arg == ""
		case "f":
			format = o.arg
		case "o":
			if !validOptionList(o.arg) {
				return imgErrorf("Invalid option list: %s", o.arg)
			}
			lists = append(lists, o.arg)
		case "q":
			quiet = true
		case "u":
			unchecked = true
		}
	}
	list := strings.Join(lists, ",")
	if wantsOptionHelp(list) {
		text, err := paramHelp(format, len(operands) > 0)
		c.printf("%s", text)
		return err
	}
	if len(operands) == 0 {
		return imgUsagef("Expecting image file name")
	}
	name := operands[0]
	size := int64(-1)
	if len(operands) > 1 {
		if size, err = c.imgSize(operands[1], "image size", math.MaxInt64); err != nil {
			return err
		}
	}
	if len(operands) > 2 {
		return imgUsagef("Unexpected argument: %s", operands[2])
	}
	t, err := newImgTarget(name, format, list, backing, backingFormat)
	if err == nil && noBacking {
		err = errNoBackingName
	}
	if err == nil {
		err = t.prepare(c, size, unchecked)
	}
	if err == nil {
		if !quiet {
			c.printf("Formatting '%s', fmt=%s%s\n", name, format, t.params)
		}
		err = t.create(c)
	}
	if err != nil {
		return imgErrorf("%s: %v", name, err)
	}
	return nil
}

// help prints the help text.
func (c *imgContext) help() error {
	c.printf("%s", imgHelp())
	return nil
}

// An imgTarget is an image that a subcommand is about to create.
type imgTarget struct {
	name   string
	params *imgParamValues
	size   int64
	device bool // create found a block device: it has content, and no file to empty
}

// errNoBackingName refuses a backing file that was asked for and not named: by a variable that is not set,
// most likely. The image would miss what it was to have.
var errNoBackingName = imgErrorf("Expected backing file name, got empty string")

// newImgTarget takes the parameters of a new image from the command line.
func newImgTarget(name, format, list, backing, backingFormat string) (*imgTarget, error) {
	params, err := newImgParams(format)
	if err != nil {
		return nil, err
	}
	if err := params.parse(list); err != nil {
		return nil, err
	}
	for _, p := range []struct{ name, value, what string }{
		{"backing_file", backing, "Backing file"},
		{"backing_fmt", backingFormat, "Backing file format"},
	} {
		if p.value == "" {
			continue
		}
		if !params.has(p.name) {
			return nil, imgErrorf("%s not supported for file format '%s'", p.what, format)
		}
		params.set(p.name, p.value)
	}
	if name, given := params.values["backing_file"]; given && name == "" {
		return nil, errNoBackingName
	}
	return &imgTarget{name: name, params: params}, nil
}

// prepare settles the size, from the backing file if it must be, and checks
// the backing file unless unchecked. size is that on the command line, or -1.
func (t *imgTarget) prepare(c *imgContext, size int64, unchecked bool) error {
	if n, ok := t.params.size("size"); ok {
		if size >= 0 {
			return imgErrorf("The image size must be specified only once")
		}
		size = n
	}
	backing, format := t.params.get("backing_file"), t.params.get("backing_fmt")
	if backing == t.name && backing != "" {
		return imgErrorf("Error: Trying to create an image with the same filename as the backing file")
	}
	if backing != "" && !unchecked {
		backingSize, probed, err := t.backingSize(c, backing, format)
		if err != nil {
			return err
		}
		if format == "" {
			return imgErrorf("Backing file specified without backing format\nDetected format of %s.", probed)
		}
		if size < 0 {
			size = backingSize
		}
	}
	if size < 0 {
		return imgErrorf("Image creation needs a size parameter")
	}
	if backing != "" && format == "" {
		return imgErrorf("Backing file specified without backing format")
	}
	t.setSize(size)
	return nil
}

func (t *imgTarget) setSize(size int64) {
	t.size = size
	t.params.set("size", strconv.FormatInt(size, 10))
}

// backingSize opens the backing file and returns its virtual size and format.
func (t *imgTarget) backingSize(c *imgContext, backing, format string) (int64, string, error) {
	full, err := imagefile.FullBackingName(t.name, backing)
	if err != nil {
		return 0, "", err
	}
	disk, info, err := imagefile.Open(c, full, imagefile.Options{Format: format, ReadOnly: true, ForceShare: true, NoBacking: true})
	if err != nil {
		return 0, "", imgErrorf("%s\nCould not open backing image.", imgText(err))
	}
	size := disk.Size()
	return size, info.Format, disk.Close()
}

// createOptions returns what qcow2.Create takes, or a fault in qemu-img's words.
func (t *imgTarget) createOptions() (qcow2.CreateOptions, error) {
	p := t.params
	o := qcow2.CreateOptions{
		LazyRefcounts:   p.get("lazy_refcounts") == "on",
		CompressionType: p.get("compression_type"),
		BackingFile:     p.get("backing_file"),
		BackingFormat:   p.get("backing_fmt"),
	}
	switch compat := p.get("compat"); compat {
	case "", "1.1", "v3":
		o.Version = 3
	case "0.10", "v2":
		o.Version = 2
	default:
		return o, imgErrorf("Parameter 'version' does not accept value '%s'", compat)
	}
	if o.CompressionType != "zlib" && o.CompressionType != "zstd" {
		return o, imgErrorf("Parameter 'compression-type' does not accept value '%s'", o.CompressionType)
	}
	var err error
	if o.Preallocation, err = t.preallocation(); err != nil {
		return o, err
	}
	o.ClusterSize, _ = p.size("cluster_size")
	if o.ClusterSize < 512 || o.ClusterSize > 2<<20 || o.ClusterSize&(o.ClusterSize-1) != 0 {
		return o, imgErrorf("Cluster size must be a power of two between 512 and 2048k")
	}
	bits, err := strconv.Atoi(p.get("refcount_bits"))
	if err != nil || bits < 1 || bits > 64 || bits&(bits-1) != 0 {
		return o, imgErrorf("Refcount width must be a power of two and may not exceed 64 bits")
	}
	o.RefcountBits = bits
	switch {
	case o.BackingFormat != "" && o.BackingFormat != "qcow2" && o.BackingFormat != "raw":
		return o, imgErrorf("Parameter 'backing-fmt' does not accept value '%s'", o.BackingFormat)
	case o.BackingFile != "" && o.Preallocation != qcow2.PreallocationOff:
		return o, imgErrorf("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	case o.BackingFile == "" && o.BackingFormat != "":
		return o, imgErrorf("Backing format cannot be used without backing file")
	case o.Version == 2 && o.CompressionType != "zlib":
		return o, imgErrorf("Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)")
	case o.Version == 2 && o.LazyRefcounts:
		return o, imgErrorf("Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)")
	case o.Version == 2 && bits != 16:
		return o, imgErrorf("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)")
	}
	return o, nil
}

// preallocation parses the parameter of that name.
func (t *imgTarget) preallocation() (qcow2.Preallocation, error) {
	switch mode := qcow2.Preallocation(t.params.get("preallocation")); mode {
	case "":
		return qcow2.PreallocationOff, nil
	case qcow2.PreallocationMetadata:
		if t.params.format == "raw" {
			return "", imgErrorf("Unsupported preallocation mode '%s'", mode)
		}
		return mode, nil
	case qcow2.PreallocationOff, qcow2.PreallocationFalloc, qcow2.PreallocationFull:
		return mode, nil
	default:
		return "", imgErrorf("Parameter 'preallocation' does not accept value '%s'", mode)
	}
}

// create makes the file and writes the image.
func (t *imgTarget) create(c *imgContext) (err error) {
	var o qcow2.CreateOptions
	if t.params.format == "qcow2" {
		if o, err = t.createOptions(); err != nil {
			return err
		}
	} else if o.Preallocation, err = t.preallocation(); err != nil {
		return err
	}
	if backing := t.params.get("backing_file"); backing != "" {
		full, err := imagefile.FullBackingName(t.name, backing)
		if err == nil && c.reads(full, t.params.get("backing_fmt"), t.name) {
			return imgErrorf("Error: Trying to create an image with the same filename as the backing file")
		}
	}
	f, err := imgCreateFile(t.name)
	if err != nil {
		return imgErrorf("%s", imgText(err))
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
	}()
	switch size, device, serr := deviceSize(f); {
	case serr != nil:
		err = serr
	case device && t.params.format == "qcow2":
		return imgErrorf("'%s' is a block device, and a qcow2 image can only be created in a file", t.name)
	case device:
		if size < t.size {
			return imgErrorf("Device size too small: '%s' has %d bytes, the image %d", t.name, size, t.size)
		}
		t.device = true // it stays as it is
	case t.params.format == "qcow2":
		if err = f.Truncate(0); err == nil {
			err = wholeOrEmpty(f, qcow2.Create(c, f, t.size, o))
		}
	default:
		err = createRaw(c, f, t.size, o.Preallocation)
	}
	if err != nil {
		return imgErrorf("%s", imgText(err))
	}
	return nil
}

// deviceSize reports whether f is a block device, and how large it is.
func deviceSize(f *qcow2.OSFile) (size int64, device bool, err error) {
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeDevice == 0 {
		return 0, false, err
	}
	size, err = f.Size()
	return size, true, err
}

// imgCreateFile opens the file name for a new image, and makes it if it is not
// there. Its lock comes before its content goes.
func imgCreateFile(name string) (*qcow2.OSFile, error) {
	f, err := os.OpenFile(strings.TrimPrefix(name, "file:"), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, imgErrorf("Could not create '%s': %s", name, errnoText(err))
	}
	file, err := qcow2.NewOSFile(f, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		f.Close()
		return nil, err
	}
	return file, nil
}

// createRaw makes f a raw image of size bytes, rounded up to 512.
func createRaw(c *imgContext, f *qcow2.OSFile, size int64, mode qcow2.Preallocation) error {
	if size > math.MaxInt64-511 {
		return fmt.Errorf("size %d: %w", size, unix.EFBIG)
	}
	size = (size + 511) &^ 511
	err := errors.Join(f.Truncate(0), f.Truncate(size))
	if err == nil {
		err = preallocateRaw(c, f, 0, size, mode)
	}
	if err == nil {
		err = f.Datasync()
	}
	return wholeOrEmpty(f, err)
}

// wholeOrEmpty gives back the space of an image whose making has failed with err.
func wholeOrEmpty(f *qcow2.OSFile, err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(err, f.Truncate(0))
}

// preallocateRaw gives [off, end) of a raw image its space.
func preallocateRaw(c *imgContext, f qcow2.File, off, end int64, mode qcow2.Preallocation) error {
	switch {
	case off >= end:
		return nil
	case mode == qcow2.PreallocationFalloc:
		return f.Allocate(off, end-off)
	case mode == qcow2.PreallocationFull:
		zeroes := qcow2.GetBuffer(1 << 20)
		defer qcow2.PutBuffer(zeroes)
		clear(zeroes)
		for off < end {
			if err := c.Err(); err != nil {
				return err
			}
			n := min(end-off, int64(len(zeroes)))
			if _, err := f.WriteAt(zeroes[:n], off); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}
