package main

import (
	"errors"
	"time"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

var imgSnapshotSyntax = imgSyntax{short: "la:c:d:hqU", long: map[string]string{"help": "h", "force-share": "U"}}

// imgSnapshot is "img snapshot".
func imgSnapshot(c *imgContext, args []string) (err error) {
	opts, operands, err := imgSnapshotSyntax.parse(args)
	if err != nil {
		return err
	}
	action, name, share := "", "", false
	for _, o := range opts {
		switch o.name {
		case "h":
			return c.help()
		case "U":
			share = true
		case "q": // there is nothing to be quiet about
		default:
			if action != "" {
				return imgUsagef("Cannot mix '-l', '-a', '-c', '-d'")
			}
			action, name = o.name, o.arg
		}
	}
	if len(operands) != 1 {
		return imgUsagef("Expecting one image file name")
	}
	readOnly := action == "" || action == "l"
	disk, _, err := c.open(operands[0], imagefile.Options{ReadOnly: readOnly, ForceShare: share && readOnly, Discard: true})
	if err != nil {
		return err
	}
	defer closeImage(disk, &err)
	im, ok := disk.(*qcow2.Image)
	switch {
	case action == "":
	case action == "l":
		if ok {
			c.printf("%s", snapshotTable(im.Snapshots()))
		}
	case action == "c" && !ok:
		return imgErrorf("Could not create snapshot '%s': -95 (Operation not supported)", name)
	case action == "c":
		// QEMU records the state of a machine that was never started.
		if _, err := im.CreateSnapshot(c, qcow2.Snapshot{Name: name, Date: time.Now()}); err != nil {
			return imgErrorf("Could not create snapshot '%s': %s", name, imgText(err))
		}
	case action == "a" && !ok:
		return imgErrorf("Could not apply snapshot '%s': Block driver does not support internal snapshots", name)
	case action == "a":
		if err := im.ApplySnapshot(c, name); err != nil {
			text := imgText(err)
			if errors.Is(err, qcow2.ErrSnapshotNotFound) {
				text = "Failed to load snapshot: No such file or directory"
			}
			return imgErrorf("Could not apply snapshot '%s': %s", name, text)
		}
	case action == "d":
		var id string
		if ok {
			id = snapshotByName(im, name)
		}
		if id == "" {
			return imgErrorf("Could not delete snapshot '%s': snapshot not found", name)
		}
		if err := im.DeleteSnapshot(c, id); err != nil {
			return imgErrorf("Could not delete snapshot '%s': %s", name, imgText(err))
		}
	}
	return nil
}

// snapshotByName returns the ID of the first internal snapshot called name:
// qemu-img deletes by name only.
func snapshotByName(im *qcow2.Image, name string) string {
	for _, s := range im.Snapshots() {
		if s.Name == name {
			return s.ID
		}
	}
	return ""
}
