package demo

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// A life is that of a volume with one filesystem, and of what is made from it.
type life struct {
	*demo
	fs string

	source, restored, clone *volume
	snapshot                string // ID

	tree    manifest // as it was at the snapshot
	changed manifest // as it is since

	log     *writer // wrote while the snapshot was taken
	upTo    int     // files of log that were synced before the snapshot
	notFrom int     // first file of log that was begun after it
}

func treeDir(target string) string { return filepath.Join(target, "tree") }
func logDir(target string) string  { return filepath.Join(target, "log") }

func (l *life) play(ctx context.Context) error {
	l.print.heading("A volume with " + l.fs)
	for _, s := range []struct {
		title string
		run   func(context.Context) error
	}{
		{"Create a volume of " + size(sourceBytes), l.create},
		{"Attach it, make " + l.fs + " on it, mount it", l.attach},
		{"Write a source tree into it", l.fill},
		{"Snapshot it while files are being written", l.takeSnapshot},
		{"Change and delete files", l.change},
		{"Restore the snapshot into a new volume of " + size(restoredBytes), l.restore},
		{"Clone the volume while it is in use, mount both side by side", l.cloneLive},
		{"Let stock QEMU read the clone, with the source in use", l.readWithQEMU},
	} {
		if err := l.step(ctx, s.title, s.run); err != nil {
			return err
		}
	}
	return nil
}

func (l *life) create(ctx context.Context) (err error) {
	l.source, err = l.demo.create(ctx, l.fs+"-source", l.fs, sourceBytes, content{})
	return err
}

func (l *life) attach(ctx context.Context) error {
	target, err := l.mount(ctx, l.source)
	if err != nil {
		return err
	}
	total, _, err := capacity(target)
	if err != nil {
		return err
	}
	return l.hold(total > sourceBytes*9/10, "the filesystem has nearly %s, it has %s", size(sourceBytes), size(total))
}

func (l *life) fill(ctx context.Context) error {
	from, where, err := source(l.Source)
	if err != nil {
		return err
	}
	sums, bytes, err := copyTree(from, treeDir(l.stage.target(l.source.id)), ctx.Err)
	if err != nil {
		return err
	}
	l.tree = sums
	l.print.detail("files", "%d, %s, from %s; checksums recorded", len(sums), size(bytes), where)
	return l.hold(len(sums) > 0, "%s has files", where)
}

// takeSnapshot takes the snapshot while a writer works in the volume.
func (l *life) takeSnapshot(ctx context.Context) (err error) {
	const some = 20 // files synced before the snapshot, and after
	if l.log, err = startWriter(logDir(l.stage.target(l.source.id))); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.log.end()) }()
	if err := l.log.wait(ctx, some); err != nil {
		return err
	}
	l.log.longest() // forget what was before
	l.upTo = l.log.count()
	if l.snapshot, err = l.client.snapshot(ctx, l.fs+"-snapshot", l.source); err != nil {
		return err
	}
	// File number count() may be half written; the one after it is not begun.
	synced := l.log.count()
	l.notFrom = synced + 1
	pause := l.log.longest()
	if err := l.log.wait(ctx, synced+some); err != nil {
		return err
	}
	l.print.detail("snapshot", "internal, in the same file: no copy")
	l.print.detail("writer", "%d files synced before it, %d during it, %d after; none took over %s", l.upTo, synced-l.upTo, l.log.count()-synced, duration(pause))
	return nil
}

func (l *life) change(context.Context) error {
	after, changed, removed, added, err := change(treeDir(l.stage.target(l.source.id)), l.tree)
	if err != nil {
		return err
	}
	l.changed = after
	l.print.detail("files", "%d changed, %d deleted, %d added", changed, removed, added)
	return nil
}

func (l *life) restore(ctx context.Context) (err error) {
	l.restored, err = l.demo.create(ctx, l.fs+"-restored", l.fs, restoredBytes, content{snapshot: l.snapshot})
	if err != nil {
		return err
	}
	if err := l.backing(ctx, l.restored, l.source); err != nil {
		return err
	}
	target, err := l.mount(ctx, l.restored)
	if err != nil {
		return err
	}
	total, _, err := capacity(target)
	if err != nil {
		return err
	}
	if err := l.hold(total > restoredBytes*9/10, "the filesystem has nearly %s, it has %s", size(restoredBytes), size(total)); err != nil {
		return err
	}
	if err := l.compare(ctx, treeDir(target), l.tree); err != nil {
		return err
	}
	if err := l.holds(l.log.holds(logDir(target), l.upTo, l.notFrom)); err != nil {
		return err
	}
	l.files += l.upTo
	l.print.detail("equal", "%d files as they were; all %d synced before the snapshot, none begun after", len(l.tree), l.upTo)
	l.print.detail("larger", "the filesystem has %s now", size(total))
	return nil
}

func (l *life) cloneLive(ctx context.Context) (err error) {
	l.clone, err = l.demo.create(ctx, l.fs+"-clone", l.fs, sourceBytes, content{volume: l.source.id})
	if err != nil {
		return err
	}
	if err := l.backing(ctx, l.clone, l.source); err != nil {
		return err
	}
	target, err := l.mount(ctx, l.clone)
	if err != nil {
		return err
	}
	for _, v := range []*volume{l.source, l.clone} {
		if err := l.compare(ctx, treeDir(l.stage.target(v.id)), l.changed); err != nil {
			return err
		}
	}
	// Writes to one must not show in the other.
	origin := l.stage.target(l.source.id)
	for _, w := range []struct{ here, there string }{{origin, target}, {target, origin}} {
		const name = "written-to-one-side"
		if err := os.WriteFile(filepath.Join(w.here, name), []byte(w.here), 0o644); err != nil {
			return err
		}
		if err := syncFilesystem(w.here); err != nil {
			return err
		}
		_, err := os.Stat(filepath.Join(w.there, name))
		if err := l.hold(errors.Is(err, os.ErrNotExist), "what is written to one side does not show on the other"); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(w.here, name)); err != nil {
			return err
		}
	}
	l.print.detail("equal", "%d files on both sides; a write to one does not show in the other", len(l.changed))
	return nil
}

// readWithQEMU detaches the clone, for QEMU refuses an image in use, converts
// it with qemu-img while the source stays mounted, and mounts the result.
func (l *life) readWithQEMU(ctx context.Context) (err error) {
	if err := l.client.unmount(ctx, l.clone.id); err != nil {
		return err
	}
	raw := l.stage.path("qemu", l.fs+".raw")
	if err := command(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", l.stage.disk(l.clone.id), raw); err != nil {
		return err
	}
	if err := os.MkdirAll(l.stage.qemuMount(), 0o700); err != nil {
		return err
	}
	options := "ro,loop"
	if l.fs == "xfs" {
		options += ",nouuid" // its source is mounted
	}
	if err := command(ctx, "mount", "-t", l.fs, "-o", options, raw, l.stage.qemuMount()); err != nil {
		return err
	}
	err = l.compare(ctx, treeDir(l.stage.qemuMount()), l.changed)
	if err := errors.Join(err, l.stage.unmountQEMU(), os.Remove(raw)); err != nil {
		return err
	}
	l.print.detail("qemu-img", "convert -f qcow2 -O raw, then mount: %d files equal", len(l.changed))
	_, err = l.client.mount(ctx, l.clone)
	return err
}

// expand grows the source while a writer works in it.
func (l *life) expand(ctx context.Context) error {
	target := l.stage.target(l.source.id)
	before, _, err := capacity(target)
	if err != nil {
		return err
	}
	online := l.fs != "ext4" || mayResizeExt4()
	if err := l.expandInUse(ctx, target, online); err != nil {
		return err
	}
	how := "while in use"
	if !online {
		how = "when mounted again: this machine denies CAP_SYS_RESOURCE"
		if err := l.client.unmount(ctx, l.source.id); err != nil {
			return err
		}
		if _, err := l.client.mount(ctx, l.source); err != nil {
			return err
		}
	}
	after, _, err := capacity(target)
	if err != nil {
		return err
	}
	l.print.detail(l.fs, "%s before, %s now, grown %s", size(before), size(after), how)
	if err := l.hold(after > expandedBytes*9/10, "the filesystem has nearly %s, it has %s", size(expandedBytes), size(after)); err != nil {
		return err
	}
	return l.compare(ctx, treeDir(target), l.changed)
}

// expandInUse makes the CSI calls between two writes of a writer.
func (l *life) expandInUse(ctx context.Context, target string, itsFilesystem bool) (err error) {
	w, err := startWriter(filepath.Join(target, "expanding"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.end()) }()
	if err := w.wait(ctx, 5); err != nil {
		return err
	}
	if err := l.client.expand(ctx, l.source, expandedBytes, itsFilesystem); err != nil {
		return err
	}
	return w.wait(ctx, w.count()+5)
}
