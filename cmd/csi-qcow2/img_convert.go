package main

import (
	"math"
	"slices"
	"strconv"
	"strings"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
	"csi-qcow2/qcow2/convert"
)

var imgConvertSyntax = imgSyntax{short: "hf:O:B:CcF:o:l:S:pt:T:qnm:WU", long: map[string]string{
	"help": "h", "force-share": "U", "target-is-zero": "target-is-zero",
}}

// An imgConversion is the command line of "img convert".
type imgConversion struct {
	format, outFormat      string
	backing, backingFormat string
	options                []string
	snapshot               string
	cache, sourceCache     string
	sparse                 int64 // -S; -1 if not given
	workers                int

	compressed, offload, progress, quiet, noCreate bool
	anyOrder, share, targetIsZero                  bool

	sources []string
	target  string
}

// maxSparse is the largest argument of -S.
const maxSparse = 16 << 20

// imgConvert is "img convert".
func imgConvert(c *imgContext, args []string) error {
	opts, operands, err := imgConvertSyntax.parse(args)
	if err != nil {
		return err
	}
	v := imgConversion{outFormat: "raw", cache: "unsafe", sourceCache: "writeback", sparse: -1, workers: convert.DefaultWorkers}
	for _, o := range opts {
		if o.name == "h" {
			return c.help()
		}
		if err := v.set(c, o); err != nil {
			return err
		}
	}
	if list := strings.Join(v.options, ","); wantsOptionHelp(list) {
		text, err := paramHelp(v.outFormat, len(operands) > 0)
		c.printf("%s", text)
		return err
	}
	if len(operands) > 0 {
		v.sources, v.target = operands[:len(operands)-1], operands[len(operands)-1]
	}
	if err := v.validate(); err != nil {
		return err
	}
	return v.run(c)
}

// set takes one option.
func (v *imgConversion) set(c *imgContext, o imgOption) (err error) {
	switch o.name {
	case "f":
		v.format = o.arg
	case "O":
		v.outFormat = o.arg
	case "B":
		if v.backing = o.arg; o.arg == "" {
			return errNoBackingName
		}
	case "F":
		v.backingFormat = o.arg
	case "C":
		v.offload = true
	case "c":
		v.compressed = true
	case "o":
		if !validOptionList(o.arg) {
			return imgErrorf("Invalid option list: %s", o.arg)
		}
		v.options = append(v.options, o.arg)
	case "l":
		v.snapshot, err = c.parseSnapshotParam(o.arg)
	case "S":
		if v.sparse, err = c.imgSize(o.arg, "buffer size for sparse output", math.MaxInt64); err != nil {
			return err
		}
		if v.sparse%512 != 0 || v.sparse > maxSparse {
			return imgErrorf("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to %d. "+
				"Select 0 to disable sparse detection (fully allocates output).", maxSparse)
		}
	case "p":
		v.progress = true
	case "q":
		v.quiet = true
	case "t":
		v.cache = o.arg
	case "T":
		v.sourceCache = o.arg
	case "n":
		v.noCreate = true
	case "m":
		n, err := strconv.Atoi(o.arg)
		if err != nil || n < 1 || n > 16 {
			return imgErrorf("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
		}
		v.workers = n
	case "W":
		v.anyOrder = true
	case "U":
		v.share = true
	case "target-is-zero":
		v.targetIsZero = true
	}
	return err
}

// parseSnapshotParam returns the ID or name of the snapshot in the argument of -l.
func (c *imgContext) parseSnapshotParam(s string) (string, error) {
	if !strings.HasPrefix(s, "snapshot.") {
		return s, nil
	}
	found := ""
	for _, part := range splitOptions(s) {
		key, value, _ := strings.Cut(part, "=")
		if key != "snapshot.id" && key != "snapshot.name" {
			c.errorf("Invalid parameter '%s'", key)
			return "", imgErrorf("Failed in parsing snapshot param '%s'", s)
		}
		if key == "snapshot.id" || found == "" {
			found = value
		}
	}
	return found, nil
}

// validate refuses what does not go together.
func (v *imgConversion) validate() error {
	switch {
	case v.targetIsZero && !v.noCreate:
		return imgErrorf("--target-is-zero requires use of -n flag")
	case v.noCreate && len(v.options) > 0:
		return imgErrorf("-o has no effect when skipping image creation")
	case v.offload && v.compressed:
		return imgErrorf("Cannot enable copy offloading when -c is used")
	case v.offload && v.sparse >= 0:
		return imgErrorf("Cannot enable copy offloading when -S is used")
	case len(v.sources) < 1:
		return imgErrorf("Must specify image file name")
	case imgParams[v.outFormat] == nil:
		return imgErrorf("Unknown file format '%s'", v.outFormat)
	case v.compressed && v.outFormat != "qcow2":
		return imgErrorf("Compression not supported for this file format")
	case v.snapshot != "" && len(v.sources) > 1:
		return imgErrorf("No support for concatenating multiple snapshot")
	}
	return nil
}

// run converts.
func (v *imgConversion) run(c *imgContext) (err error) {
	cache, err := imgCacheMode(v.cache, "")
	if err != nil {
		return err
	}
	src, err := v.openSource(c)
	if err != nil {
		return err
	}
	defer closeImage(src, &err)

	o := convert.Options{
		Workers:       v.workers,
		AnyOrder:      v.anyOrder,
		Compressed:    v.compressed,
		TargetIsZero:  v.targetIsZero,
		WriteZeroData: v.sparse == 0,
		Granule:       v.sparse,
	}
	backing := v.backing
	if v.noCreate {
		if err := v.checkTarget(c); err != nil {
			return err
		}
	} else {
		t, err := newImgTarget(v.target, v.outFormat, strings.Join(v.options, ","), v.backing, v.backingFormat)
		if err != nil {
			return err
		}
		backing = t.params.get("backing_file")
		if err := v.create(c, t, src.Size()); err != nil {
			return err
		}
		o.TargetIsZero = !t.device
		mode := t.params.get("preallocation")
		o.KeepSpace = mode == string(qcow2.PreallocationFalloc) || mode == string(qcow2.PreallocationFull)
	}
	o.TargetHasBacking = backing != ""

	dst, _, err := c.open(v.target, imagefile.Options{Format: v.outFormat, CacheMode: cache, Discard: true})
	if err != nil {
		return err
	}
	defer closeImage(dst, &err)
	if dst.Size() < src.Size() {
		return imgErrorf("output file is smaller than input file")
	}
	if granule := imgClusterSize(dst); granule > 0 {
		o.Granule = granule
	}
	bar := newImgProgress(c.stdout, v.progress && !v.quiet, src.Size())
	defer bar.end()
	o.Progress = bar.update
	if err := convert.Copy(c, dst, src, o); err != nil {
		return imgErrorf("error while converting: %s", imgText(err))
	}
	bar.update(bar.total)
	return nil
}

// imgClusterSize returns the cluster size of a qcow2 image, 0 for a raw one.
func imgClusterSize(d qcow2.Disk) int64 {
	if im, ok := d.(interface{ Info() qcow2.Info }); ok {
		return im.Info().ClusterSize
	}
	return 0
}

// openSource opens the source images, as one disk.
func (v *imgConversion) openSource(c *imgContext) (qcow2.Disk, error) {
	mode, err := imgCacheMode(v.sourceCache, "source ")
	if err != nil {
		return nil, err
	}
	var disks []qcow2.Disk
	for _, name := range v.sources {
		disk, err := v.openOne(c, name, mode)
		if err != nil {
			for _, d := range disks {
				d.Close()
			}
			return nil, err
		}
		disks = append(disks, disk)
	}
	if len(disks) == 1 {
		return disks[0], nil
	}
	return convert.Concat(disks...), nil
}

func (v *imgConversion) openOne(c *imgContext, name string, mode imagefile.CacheMode) (qcow2.Disk, error) {
	o := imagefile.Options{Format: v.format, ReadOnly: true, CacheMode: mode, ForceShare: v.share, NoWriters: true}
	disk, info, err := c.open(name, o)
	if err != nil || v.snapshot == "" {
		return disk, err
	}
	im, ok := disk.(*qcow2.Image)
	found := ok && slices.ContainsFunc(im.Snapshots(), func(s qcow2.Snapshot) bool {
		return s.ID == v.snapshot || s.Name == v.snapshot
	})
	if err := disk.Close(); err != nil {
		return nil, imgErrorf("%s", imgText(err))
	}
	switch {
	case !ok:
		return nil, imgErrorf("Failed to load snapshot: Block format '%s' used by device '' does not support temporarily loading internal snapshots", info.Format)
	case !found:
		return nil, imgErrorf("Failed to load snapshot: Can't find snapshot")
	}
	o.Snapshot = v.snapshot
	disk, _, err = c.open(name, o)
	return disk, err
}

// create makes the target image.
func (v *imgConversion) create(c *imgContext, t *imgTarget, size int64) error {
	t.setSize(size)
	backing, format := t.params.get("backing_file"), t.params.get("backing_fmt")
	if v.compressed && !slices.Contains([]string{"", "off"}, t.params.get("preallocation")) {
		return imgErrorf("Compression and preallocation not supported at the same time")
	}
	if backing != "" && format == "" {
		return imgErrorf("Use of backing file requires explicit backing format")
	}
	if format != "" && format != "qcow2" && format != "raw" {
		return imgErrorf("%s: error while converting %s: Unknown backing file format '%s'", v.target, v.outFormat, format)
	}
	if backing != "" {
		// A target that cannot be opened afterwards is better not made.
		if err := v.tryBacking(c, backing, format); err != nil {
			return err
		}
	}
	if err := v.checkTarget(c); err != nil {
		return err
	}
	if err := t.create(c); err != nil {
		return imgErrorf("%s: error while converting %s: %v", v.target, v.outFormat, err)
	}
	return nil
}

// checkTarget refuses a target that a source reads. With force-share no lock would tell.
func (v *imgConversion) checkTarget(c *imgContext) error {
	for _, name := range v.sources {
		if c.reads(name, v.format, v.target) {
			what := v.target + ": error while converting " + v.outFormat
			if v.noCreate {
				what = "Could not open '" + v.target + "'"
			}
			return imgErrorf("%s: Failed to get \"write\" lock\nIs another process using the image [%s]?", what, v.target)
		}
	}
	return nil
}

// tryBacking opens the backing chain of the target.
func (v *imgConversion) tryBacking(c *imgContext, backing, format string) error {
	full, err := imagefile.FullBackingName(v.target, backing)
	if err == nil {
		var disk qcow2.Disk
		if disk, _, err = imagefile.Open(c, full, imagefile.Options{Format: format, ReadOnly: true}); err == nil {
			err = disk.Close()
		}
	}
	if err != nil {
		return imgErrorf("Could not open '%s': Could not open backing file: %s", v.target, imgText(err))
	}
	return nil
}
