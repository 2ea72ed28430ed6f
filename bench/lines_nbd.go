package main

import (
	"context"
	"os/exec"
	"path/filepath"
	"time"
)

func requestLines() []*line {
	read := func(depth, jobs int) load { return load{rw: "randread", block: "4k", depth: depth, jobs: jobs} }
	return append([]*line{
		allocated("read-4k-qd32", "requests", "4 KiB random read, queue depth 32", read(32, 1), 4.5, 1.15),
		allocated("read-4k-4x16", "requests", "4 KiB random read, 4 clients, queue depth 16", read(16, 4), 7, 1.5),
		allocated("read-4k-qd1", "requests", "4 KiB random read, queue depth 1", read(1, 1), 3, 1.8),
		allocated("write-4k-qd32", "requests", "4 KiB random write in place, queue depth 32",
			load{rw: "randwrite", block: "4k", depth: 32}, 3.5, 1.0),
		empty("write-4k-empty", "requests", "4 KiB random write, empty image, each allocates a cluster, queue depth 32",
			load{rw: "randwrite", block: "4k", align: "64k", depth: 32, once: true}, 4.0),
		empty("write-64k-empty", "requests", "64 KiB random write, empty image, queue depth 32",
			load{rw: "randwrite", block: "64k", depth: 32, once: true}, 2.0),
		largeLine(),
	}, flushLines()...)
}

func streamLines() []*line {
	return []*line{
		allocated("read-1m", "streams", "1 MiB sequential read, queue depth 4", load{rw: "read", block: "1m", depth: 4, stream: true}, 1.4, 0.95),
		allocated("write-1m", "streams", "1 MiB sequential write in place, queue depth 4", load{rw: "write", block: "1m", depth: 4, stream: true}, 1.5, 0.95),
		empty("write-1m-empty", "streams", "1 MiB sequential write, empty image, queue depth 4",
			load{rw: "write", block: "1m", depth: 4, once: true, stream: true}, 2.0),
		nbdcopyLine(),
	}
}

// unitOf returns what fio's figure for l counts.
func unitOf(l load) unit {
	if l.stream {
		return mbps
	}
	return iops
}

// A place makes the image that a contestant's server serves.
type place func(ctx context.Context, e *env, raw bool) (path string, err error)

// full is the image whose clusters are all allocated, the same for all.
func full(ctx context.Context, e *env, raw bool) (string, error) {
	if raw {
		return e.fullRaw()
	}
	return e.fullImage(ctx)
}

// fresh returns an empty image for each turn.
func fresh(options ...string) place {
	return func(ctx context.Context, e *env, _ bool) (string, error) {
		path := e.path("fresh.qcow2")
		return path, e.emptyImage(ctx, path, e.fresh, options...)
	}
}

// loaded returns the contestant whose server s is loaded by fio.
func loaded(s server, p place, l load) contestant {
	return contestant{s.name, func(ctx context.Context, e *env) (figure float64, err error) {
		image, err := p(ctx, e, s.raw)
		if err != nil {
			return 0, err
		}
		err = e.serve(ctx, s, image, func(uri string) (err error) {
			figure, err = fio(ctx, l, l.nbd(uri, e.time))
			return err
		})
		return figure, err
	}}
}

// each returns the contestants of several servers.
func each(servers []server, p place, l load) []contestant {
	var all []contestant
	for _, s := range servers {
		all = append(all, loaded(s, p, l))
	}
	return all
}

// allocated is a line over the image whose clusters are all allocated.
func allocated(name, group, title string, l load, overQEMU, overRaw float64) *line {
	overBest := 1.0
	if l.stream {
		overBest = overQEMU
	}
	return &line{
		name: name, group: group, title: title, unit: unitOf(l),
		ours: loaded(oursServer, full, l),
		peers: []peer{
			{"qemu-nbd", each(qemuServers[:1], full, l), overQEMU},
			{"best QEMU", each(qemuServers[1:], full, l), overBest},
			{nbdkitServer.name, []contestant{loaded(nbdkitServer, full, l)}, overRaw},
		},
	}
}

// empty is a line over images that are new for each turn.
func empty(name, group, title string, l load, overQEMU float64) *line {
	return &line{
		name: name, group: group, title: title, unit: unitOf(l),
		ours:  loaded(oursServer, fresh(), l),
		peers: []peer{{"best QEMU", each(qemuServers, fresh(), l), overQEMU}},
	}
}

// largeLine reads all over an image whose L2 tables are eight times the caches.
func largeLine() *line {
	l := load{rw: "randread", block: "4k", depth: 32}
	mapped := func(ctx context.Context, e *env, _ bool) (string, error) { return e.mappedImage(ctx, e.large) }
	qemu := server{name: "qemu-nbd, cache of 32 MiB", args: func(_ *env, image, socket string) []string {
		return []string{
			"qemu-nbd", "-t", "-e", "16", "-k", socket, "--image-opts",
			"driver=qcow2,l2-cache-size=32M,file.driver=file,file.filename=" + image,
		}
	}}
	return &line{
		name: "read-4k-2t", group: "requests", unit: iops,
		title: "4 KiB random read all over 2 TiB, cache 1/8 of the L2 tables, queue depth 32",
		note:  "both caches hold 32 MiB of tables; the content of the clusters is holes of the host file",
		ours:  loaded(oursServer, mapped, l),
		peers: []peer{{"qemu-nbd", []contestant{loaded(qemu, mapped, l)}, 3.0}},
	}
}

// flushLines write and flush on a disk.
func flushLines() []*line {
	l := load{rw: "randwrite", block: "4k", align: "64k", depth: 1, fsync: true, once: true}
	onDisk := func(options ...string) place {
		return func(ctx context.Context, e *env, _ bool) (string, error) {
			path := filepath.Join(e.disk, "fresh.qcow2")
			return path, e.emptyImage(ctx, path, e.fresh, options...)
		}
	}
	plain := loaded(qemuNBD(), onDisk(), l)
	lazy := loaded(qemuNBD(), onDisk("lazy_refcounts=on"), l)
	const title = "4 KiB random write and FLUSH each, empty image, on disk"
	return []*line{{
		name: "write-4k-flush-disk", group: "requests", unit: iops, title: title,
		ours:  loaded(oursServer, onDisk(), l),
		peers: []peer{{"qemu-nbd", []contestant{plain}, 1.0}},
	}, {
		name: "write-4k-flush-disk-lazy", group: "requests", unit: iops, title: title + ", ours with lazy refcounts",
		ours:  loaded(oursServer, onDisk("lazy_refcounts=on"), l),
		peers: []peer{{"qemu-nbd", []contestant{plain}, 1.5}, {"qemu-nbd, lazy refcounts", []contestant{lazy}, 0}},
	}}
}

// nbdcopyLine reads a whole image with nbdcopy.
func nbdcopyLine() *line {
	copied := func(s server) contestant {
		return contestant{s.name, func(ctx context.Context, e *env) (figure float64, err error) {
			image, err := full(ctx, e, s.raw)
			if err != nil {
				return 0, err
			}
			err = e.serve(ctx, s, image, func(uri string) error {
				begin := time.Now()
				if err := run(exec.CommandContext(ctx, "nbdcopy", uri, "null:")); err != nil {
					return err
				}
				figure = float64(e.full) / 1e6 / time.Since(begin).Seconds()
				return nil
			})
			return figure, err
		}}
	}
	var qemu []contestant
	for _, s := range qemuServers {
		qemu = append(qemu, copied(s))
	}
	return &line{
		name: "nbdcopy", group: "streams", unit: mbps, title: "nbdcopy of the whole image to nowhere",
		ours:  copied(oursServer),
		peers: []peer{{"best QEMU", qemu, 0}, {nbdkitServer.name, []contestant{copied(nbdkitServer)}, 0}},
	}
}
