package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

var imgInfoSyntax = imgSyntax{short: "hf:U", long: map[string]string{
	"help": "h", "format": "f:", "output": "output:", "backing-chain": "backing-chain", "force-share": "U",
}}

// imgInfo is "img info".
func imgInfo(c *imgContext, args []string) error {
	opts, operands, err := imgInfoSyntax.parse(args)
	if err != nil {
		return err
	}
	var chain, asJSON, share bool
	format, output := "", "human"
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
		case "backing-chain":
			chain = true
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting one image file name")
	}
	if asJSON, err = imgOutput(output); err != nil {
		return err
	}
	infos, err := c.chainInfo(operands[0], format, share, chain)
	if err != nil {
		return err
	}
	if !asJSON {
		for i := range infos {
			if i > 0 {
				c.printf("\n")
			}
			c.printf("%s", infos[i].human())
		}
		return nil
	}
	if !chain {
		c.printf("%s\n", imgJSON(infos[0].object()))
		return nil
	}
	list := make([]any, len(infos))
	for i := range infos {
		list[i] = infos[i].object()
	}
	c.printf("%s\n", imgJSON(list))
	return nil
}

// An imageInfo is what info says of one image.
type imageInfo struct {
	name, format string
	size         int64 // virtual
	hostBytes    int64
	qcow2        *qcow2.Info // nil for raw
	fullBacking  string      // "" if there is none or it cannot be told
}

// chainInfo describes the image name, and those below it if chain is set.
func (c *imgContext) chainInfo(name, format string, share, chain bool) ([]imageInfo, error) {
	var infos []imageInfo
	var seen []os.FileInfo
	for first := true; first || name != ""; first = false { // the name that is asked for may be "", and is none
		if path := imagefile.HostPath(name); path != "" {
			if st, err := os.Stat(path); err == nil {
				for _, above := range seen {
					if os.SameFile(above, st) {
						return nil, imgErrorf("Backing file '%s' creates an infinite loop.", name)
					}
				}
				seen = append(seen, st)
			}
		}
		info, err := c.imageInfo(name, format, share)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
		name, format = "", ""
		if chain && info.qcow2 != nil {
			name, format = info.fullBacking, info.qcow2.BackingFormat
		}
	}
	return infos, nil
}

// imageInfo describes one image.
func (c *imgContext) imageInfo(name, format string, share bool) (info imageInfo, err error) {
	disk, opened, err := c.open(name, imagefile.Options{Format: format, ReadOnly: true, ForceShare: share, NoBacking: true})
	if err != nil {
		return info, err
	}
	defer closeImage(disk, &err)
	info = imageInfo{name: strings.TrimPrefix(name, "file:"), format: opened.Format, size: disk.Size()}
	if path := imagefile.HostPath(name); path != "" {
		if info.hostBytes, err = hostBytes(path); err != nil {
			return info, err
		}
	}
	if im, ok := disk.(*qcow2.Image); ok {
		i := im.Info()
		info.qcow2 = &i
		if full, err := imagefile.FullBackingName(name, i.BackingFile); err == nil {
			info.fullBacking = full
		}
	}
	return info, nil
}

// human formats the description as qemu-img does by default.
func (i *imageInfo) human() string {
	var b strings.Builder
	fmt.Fprintf(&b, "image: %s\nfile format: %s\nvirtual size: %s (%d bytes)\ndisk size: %s\n",
		i.name, i.format, humanSize(i.size), i.size, humanSize(i.hostBytes))
	q := i.qcow2
	if q == nil {
		return b.String()
	}
	fmt.Fprintf(&b, "cluster_size: %d\n", q.ClusterSize)
	if q.Dirty {
		b.WriteString("cleanly shut down: no\n")
	}
	if q.BackingFile != "" {
		fmt.Fprintf(&b, "backing file: %s", q.BackingFile)
		switch i.fullBacking {
		case q.BackingFile:
		case "":
			b.WriteString(" (cannot determine actual path)")
		default:
			fmt.Fprintf(&b, " (actual path: %s)", i.fullBacking)
		}
		b.WriteByte('\n')
		if q.BackingFormat != "" {
			fmt.Fprintf(&b, "backing file format: %s\n", q.BackingFormat)
		}
	}
	b.WriteString(snapshotTable(q.Snapshots))
	b.WriteString("Format specific information:\n")
	fmt.Fprintf(&b, "    compat: %s\n    compression type: %s\n", compat(q), q.CompressionType)
	if q.Version >= 3 {
		fmt.Fprintf(&b, "    lazy refcounts: %t\n", q.LazyRefcounts)
	}
	fmt.Fprintf(&b, "    refcount bits: %d\n", q.RefcountBits)
	if q.Version >= 3 {
		fmt.Fprintf(&b, "    corrupt: %t\n    extended l2: %t\n", q.Corrupt, q.ExtendedL2)
	}
	return b.String()
}

// object returns the description for JSON output.
func (i *imageInfo) object() map[string]any {
	o := map[string]any{
		"filename":     i.name,
		"format":       i.format,
		"virtual-size": i.size,
		"actual-size":  i.hostBytes,
		"dirty-flag":   false,
	}
	q := i.qcow2
	if q == nil {
		return o
	}
	o["cluster-size"] = q.ClusterSize
	o["dirty-flag"] = q.Dirty
	if q.BackingFile != "" {
		o["backing-filename"] = q.BackingFile
		if i.fullBacking != "" {
			o["full-backing-filename"] = i.fullBacking
		}
		if q.BackingFormat != "" {
			o["backing-filename-format"] = q.BackingFormat
		}
	}
	if len(q.Snapshots) > 0 {
		list := make([]any, len(q.Snapshots))
		for n, s := range q.Snapshots {
			list[n] = snapshotObject(s)
		}
		o["snapshots"] = list
	}
	data := map[string]any{"compat": compat(q), "compression-type": q.CompressionType, "refcount-bits": q.RefcountBits}
	if q.Version >= 3 {
		data["lazy-refcounts"] = q.LazyRefcounts
		data["corrupt"] = q.Corrupt
		data["extended-l2"] = q.ExtendedL2
	}
	o["format-specific"] = map[string]any{"type": "qcow2", "data": data}
	return o
}

// compat returns the format version as qemu-img names it.
func compat(q *qcow2.Info) string {
	if q.Version == 2 {
		return "0.10"
	}
	return "1.1"
}

// snapshotTable formats the list of internal snapshots, "" if there is none.
func snapshotTable(snapshots []qcow2.Snapshot) string {
	if len(snapshots) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("Snapshot list:\n")
	fmt.Fprintf(&b, "%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	for _, s := range snapshots {
		clock := s.VMClock.Truncate(time.Millisecond)
		icount := ""
		if s.ICount >= 0 {
			icount = fmt.Sprint(s.ICount)
		}
		fmt.Fprintf(&b, "%-9s %-16s %8s%20s%13s%11s\n", s.ID, s.Name, humanSize(s.VMStateSize),
			s.Date.Local().Format(time.DateTime),
			fmt.Sprintf("%02d:%02d:%02d.%03d", int(clock.Hours()), int(clock.Minutes())%60, int(clock.Seconds())%60, clock.Milliseconds()%1000),
			icount)
	}
	return b.String()
}

// snapshotObject returns a snapshot for JSON output.
func snapshotObject(s qcow2.Snapshot) map[string]any {
	o := map[string]any{
		"id":            s.ID,
		"name":          s.Name,
		"vm-state-size": s.VMStateSize,
		"date-sec":      s.Date.Unix(),
		"date-nsec":     s.Date.Nanosecond(),
		"vm-clock-sec":  int64(s.VMClock / time.Second),
		"vm-clock-nsec": int64(s.VMClock % time.Second),
	}
	if s.ICount >= 0 {
		o["icount"] = s.ICount
	}
	return o
}
