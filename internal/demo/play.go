package demo

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	mib = int64(1) << 20
	gib = int64(1) << 30

	sourceBytes   = 1 * gib
	restoredBytes = 2 * gib
	expandedBytes = 3 * gib
)

// play runs the scenario up to where a kept run stops, and with Keep off to
// its end.
func (d *demo) play(ctx context.Context) error {
	if err := d.step(ctx, "Start the node agent", d.start); err != nil {
		return err
	}
	ext4, xfs := &life{demo: d, fs: "ext4"}, &life{demo: d, fs: "xfs"}
	for _, l := range []*life{ext4, xfs} {
		if err := l.play(ctx); err != nil {
			return err
		}
	}
	d.print.heading("More of a volume's life")
	b := &block{demo: d}
	steps := []struct {
		title string
		run   func(context.Context) error
	}{
		{"Expand both volumes while they are being written to", func(ctx context.Context) error {
			for _, l := range []*life{ext4, xfs} {
				if err := l.expand(ctx); err != nil {
					return err
				}
			}
			return nil
		}},
		{"Make a raw block volume and write to its device", b.write},
		{"Clone it, overwrite it, let stock QEMU read the clone", b.clone},
		{"Ask for statistics, as kubelet does", d.statistics},
		{"Delete a file and trim: the host gets its space back", ext4.trim},
	}
	last := []struct {
		title string
		run   func(context.Context) error
	}{
		{"Unmount and detach every volume", d.unmountAll},
		{"Let qemu-img check every file of the pool", d.checkPool},
		{"Delete the sources; what was made from them lives on", func(ctx context.Context) error {
			return d.deleteSources(ctx, ext4, xfs)
		}},
		{"Delete everything; the pool is empty", d.deleteAll},
	}
	if !d.Keep {
		steps = append(steps, last...)
	}
	for _, s := range steps {
		if err := d.step(ctx, s.title, s.run); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) start(ctx context.Context) error {
	var err error
	if d.agent, err = startAgent(d.stage, d.Binary, d.Device); err != nil {
		return err
	}
	if d.client, err = dial(d.stage); err != nil {
		return err
	}
	name, version, err := d.agent.ready(ctx, d.client)
	if err != nil {
		return err
	}
	d.print.detail("process", "csi-qcow2 node, process %d", d.agent.pid)
	d.print.detail("driver", "%s, version %s", name, version)
	d.print.detail("socket", "%s", d.stage.rel(d.stage.socket()))
	d.print.detail("pool", "%s", d.stage.rel(d.stage.pool()))
	return nil
}

// create makes a volume and remembers it for the end.
func (d *demo) create(ctx context.Context, name, fs string, bytes int64, from content) (*volume, error) {
	v, err := d.client.create(ctx, name, fs, bytes, from)
	if err != nil {
		return nil, err
	}
	d.volumes = append(d.volumes, v)
	if err := d.hold(v.bytes >= bytes, "%s has %d bytes or more, it has %d", name, bytes, v.bytes); err != nil {
		return nil, err
	}
	used, err := onHost(d.stage.disk(v.id))
	if err != nil {
		return nil, err
	}
	d.print.detail("file", "%s", d.stage.rel(d.stage.disk(v.id)))
	d.print.detail("", "called %s here; %s for the guest, %s on the host", name, size(v.bytes), size(used))
	return v, nil
}

// mount stages and publishes v and says where.
func (d *demo) mount(ctx context.Context, v *volume) (string, error) {
	target, err := d.client.mount(ctx, v)
	if err != nil {
		return "", err
	}
	device, stands, err := deviceOf(target)
	if err != nil {
		return "", err
	}
	d.print.detail("device", "%s, %s", device, stands)
	where := "mounted"
	if v.fs == "" {
		where = "node"
	}
	d.print.detail(where, "%s", d.stage.rel(target))
	return target, nil
}

// backing prints what v's image stands on, as QEMU sees it: a view, through
// which the image of source is seen as it was at a snapshot.
func (d *demo) backing(ctx context.Context, v, source *volume) error {
	files, err := d.stage.chain(ctx, d.stage.disk(v.id))
	if err != nil {
		return err
	}
	if err := d.hold(len(files) == 2, "%s has one backing file, its chain is %q", v.name, files); err != nil {
		return err
	}
	under, err := d.stage.chain(ctx, files[1])
	if err != nil {
		return err
	}
	d.print.detail("backing", "%s,", d.called(files[1]))
	d.print.detail("", "which shows %s as it was at the snapshot", d.called(under[len(under)-1]))
	return d.hold(under[len(under)-1] == d.stage.disk(source.id), "%s stands on %s", v.name, source.name)
}

// called returns a path in the pool with the volume's name for its directory.
func (d *demo) called(path string) string {
	for _, v := range d.volumes {
		if rest, ok := strings.CutPrefix(path, filepath.Dir(d.stage.disk(v.id))+"/"); ok {
			return v.name + "/" + rest
		}
	}
	return d.stage.rel(path)
}

// compare checks a tree against its manifest.
func (d *demo) compare(ctx context.Context, dir string, want manifest) error {
	if err := d.holds(compare(dir, want, ctx.Err)); err != nil {
		return fmt.Errorf("%s: %w", d.stage.rel(dir), err)
	}
	d.files += len(want)
	return nil
}

func (d *demo) unmountAll(ctx context.Context) error {
	for _, v := range slices.Backward(d.volumes) {
		if err := d.client.unmount(ctx, v.id); err != nil {
			return err
		}
	}
	left, err := d.stage.leftovers()
	if err != nil {
		return err
	}
	for _, l := range left {
		// The agent may keep its own FUSE mount until it ends.
		if l.kind == "process" || l.kind == "mount" && within(d.stage.run(), l.name) {
			continue
		}
		return d.hold(false, "nothing is left: %s", l)
	}
	d.print.detail("done", "%d volumes; no mount and no device is left", len(d.volumes))
	return d.hold(true, "nothing is left")
}

func (d *demo) checkPool(ctx context.Context) error {
	images, err := d.stage.images()
	if err != nil {
		return err
	}
	if err := d.hold(len(images) >= len(d.volumes), "%d volumes have their files, %d are there", len(d.volumes), len(images)); err != nil {
		return err
	}
	for _, image := range images {
		if err := d.holds(command(ctx, "qemu-img", "check", "-f", "qcow2", image)); err != nil {
			return err
		}
	}
	d.print.detail("clean", "%d files: no errors, no leaks", len(images))
	return nil
}

// deleteSources deletes the source volumes and their snapshots before what
// was made from them, and compares that again.
func (d *demo) deleteSources(ctx context.Context, lives ...*life) error {
	for _, l := range lives {
		if err := d.client.delete(ctx, l.source.id); err != nil {
			return err
		}
		if err := d.client.deleteSnapshot(ctx, l.snapshot); err != nil {
			return err
		}
		for _, made := range []struct {
			*volume
			want manifest
		}{{l.restored, l.tree}, {l.clone, l.changed}} {
			target, err := d.client.mount(ctx, made.volume)
			if err != nil {
				return err
			}
			if err := d.compare(ctx, treeDir(target), made.want); err != nil {
				return err
			}
			if err := d.client.unmount(ctx, made.id); err != nil {
				return err
			}
		}
		d.print.detail(l.fs, "source and snapshot deleted; %d files of the restored volume and", len(l.tree))
		d.print.detail("", "%d of the clone read again, equal", len(l.changed))
	}
	return nil
}

func (d *demo) deleteAll(ctx context.Context) error {
	for _, v := range d.volumes {
		if err := d.client.delete(ctx, v.id); err != nil { // also those that are gone: it is idempotent
			return err
		}
	}
	volumes, snapshots, err := d.client.listed(ctx)
	if err != nil {
		return err
	}
	if err := d.hold(volumes == 0 && snapshots == 0, "nothing is listed: %d volumes and %d snapshots are", volumes, snapshots); err != nil {
		return err
	}
	// Files with dependents go when their last dependent has gone.
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	for {
		content, err := d.stage.poolContent()
		if err != nil {
			return err
		}
		if len(content) == 0 {
			break
		}
		select {
		case <-ctx.Done():
			return d.hold(false, "the pool is empty: it has %v", content)
		case <-time.After(20 * time.Millisecond):
		}
	}
	d.print.detail("empty", "%s/volumes", d.stage.rel(d.stage.pool()))
	return d.hold(true, "the pool is empty")
}
