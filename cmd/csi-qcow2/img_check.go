package main

import (
	"errors"
	"fmt"
	"strings"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

// Exit codes of "img check".
const (
	checkCorrupt     = 2
	checkLeaks       = 3
	checkUnsupported = 63
)

var imgCheckSyntax = imgSyntax{short: "hf:r:T:qU", long: map[string]string{
	"help": "h", "format": "f:", "repair": "r:", "output": "output:", "force-share": "U",
}}

// imgCheck is "img check".
func imgCheck(c *imgContext, args []string) error {
	opts, operands, err := imgCheckSyntax.parse(args)
	if err != nil {
		return err
	}
	var quiet, share, asJSON bool
	var check qcow2.CheckOptions
	format, output, cacheMode := "", "human", "writeback"
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "f":
			format = o.arg
		case "r":
			switch o.arg {
			case "leaks":
				check.RepairLeaks = true
			case "all":
				check.RepairAll = true
			default:
				return imgUsagef("Unknown option value for -r (expecting 'leaks' or 'all'): %s", o.arg)
			}
		case "T":
			cacheMode = o.arg
		case "q":
			quiet = true
		case "U":
			share = true
		case "output":
			output = o.arg
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting one image file name")
	}
	if asJSON, err = imgOutput(output); err != nil {
		return err
	}
	mode, err := imgCacheMode(cacheMode, "source ")
	if err != nil {
		return err
	}
	o := imagefile.Options{Format: format, CacheMode: mode, ForceShare: share, ReadOnly: !check.RepairLeaks && !check.RepairAll}
	name := operands[0]
	report := func(r qcow2.CheckResult) {
		switch {
		case quiet:
		case asJSON:
			c.printf("%s\n", imgJSON(checkObject(name, r)))
		default:
			c.printf("%s", checkText(r))
		}
	}
	return c.check(name, o, check, report, quiet || asJSON)
}

// check checks and repairs the image name, and reports the result.
func (c *imgContext) check(name string, o imagefile.Options, check qcow2.CheckOptions, report func(qcow2.CheckResult), terse bool) (err error) {
	if err := c.tryChain(name, o); err != nil {
		return err
	}
	f, info, err := imagefile.OpenFile(c, name, o)
	if err != nil {
		return imgErrorf("Could not open '%s': %s", name, imgText(err))
	}
	defer closeImage(f, &err)
	if info.Format != "qcow2" {
		return &imgError{code: checkUnsupported, text: "This image format does not support checks"}
	}
	check.Report = func(p qcow2.Problem) { fmt.Fprintln(c.stderr, p.Msg) }
	r, err := qcow2.CheckFile(c, f, check)
	if err == nil && (r.LeaksFixed > 0 || r.CorruptionsFixed > 0) {
		if !terse {
			c.printf("The following inconsistencies were found and repaired:\n\n    %d leaked clusters\n    %d corruptions\n\n"+
				"Double checking the fixed image now...\n", r.LeaksFixed, r.CorruptionsFixed)
		}
		leaks, corruptions := r.LeaksFixed, r.CorruptionsFixed
		r, err = qcow2.CheckFile(c, f, qcow2.CheckOptions{Report: check.Report})
		r.LeaksFixed, r.CorruptionsFixed = leaks, corruptions
	}
	if err != nil {
		if errors.Is(err, qcow2.ErrNotQcow2) {
			return imgErrorf("Could not open '%s': %s", name, imgText(err))
		}
		return imgErrorf("Check failed: %s", imgText(err))
	}
	report(r)
	switch {
	case r.CheckErrors > 0:
		return imgErrorf("Check failed")
	case r.Corruptions > 0:
		return imgExit(checkCorrupt)
	case r.Leaks > 0:
		return imgExit(checkLeaks)
	}
	return nil
}

// tryChain reports a backing chain that cannot be opened. The image itself may
// be too damaged to open: that is for the check to say.
func (c *imgContext) tryChain(name string, o imagefile.Options) error {
	o.ReadOnly = true
	disk, _, err := imagefile.Open(c, name, o)
	if err == nil {
		err = disk.Close()
	}
	var backing *imagefile.BackingError
	if errors.As(err, &backing) {
		return imgErrorf("Could not open '%s': %s", name, imgText(err))
	}
	return nil
}

// checkText formats a result as qemu-img does by default.
func checkText(r qcow2.CheckResult) string {
	var b strings.Builder
	if r.Clean() {
		b.WriteString("No errors were found on the image.\n")
	}
	if r.Corruptions > 0 {
		fmt.Fprintf(&b, "\n%d errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks > 0 {
		fmt.Fprintf(&b, "\n%d leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.CheckErrors > 0 {
		fmt.Fprintf(&b, "\n%d internal errors have occurred during the check.\n", r.CheckErrors)
	}
	if r.TotalClusters != 0 && r.AllocatedClusters != 0 {
		percent := func(n, of int64) float64 { return float64(n) * 100 / float64(of) }
		fmt.Fprintf(&b, "%d/%d = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, percent(r.AllocatedClusters, r.TotalClusters),
			percent(r.FragmentedClusters, r.AllocatedClusters), percent(r.CompressedClusters, r.AllocatedClusters))
	}
	if r.ImageEndOffset > 0 {
		fmt.Fprintf(&b, "Image end offset: %d\n", r.ImageEndOffset)
	}
	return b.String()
}

// checkObject returns a result for JSON output: counts of zero are left out.
func checkObject(name string, r qcow2.CheckResult) map[string]any {
	o := map[string]any{"filename": strings.TrimPrefix(name, "file:"), "format": "qcow2", "check-errors": r.CheckErrors}
	for key, n := range map[string]int64{
		"image-end-offset":    r.ImageEndOffset,
		"corruptions":         int64(r.Corruptions),
		"leaks":               int64(r.Leaks),
		"corruptions-fixed":   int64(r.CorruptionsFixed),
		"leaks-fixed":         int64(r.LeaksFixed),
		"total-clusters":      r.TotalClusters,
		"allocated-clusters":  r.AllocatedClusters,
		"fragmented-clusters": r.FragmentedClusters,
		"compressed-clusters": r.CompressedClusters,
	} {
		if n != 0 {
			o[key] = n
		}
	}
	return o
}
