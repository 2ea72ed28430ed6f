package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"csi-qcow2/cache"
	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
	"csi-qcow2/qcow2"
	"csi-qcow2/volume"
)

// limitLines are figures of our own that must stay below a bound.
func limitLines(s sizes) []*line {
	limit := func(name, title string, below float64, u unit, run func(ctx context.Context, e *env) (float64, error)) *line {
		return &line{name: name, group: "limits", title: title, unit: u, limit: below, ours: contestant{"csi-qcow2", run}}
	}
	nothing := func(*volume.Pool) volume.Source { return volume.Source{} }
	clone := func(p *volume.Pool) volume.Source {
		id, _ := p.VolumeNamed(poolSource)
		return volume.Source{Volume: id}
	}
	restore := func(p *volume.Pool) volume.Source {
		id, _ := p.SnapshotNamed(poolSource)
		return volume.Source{Snapshot: id}
	}
	little, all := s.volume/1024, s.volume
	return []*line{
		limit("open-2t", "open of a 2 TiB image, fully mapped", 5, millis, openLarge),
		limit("create-volume", "CreateVolume of 1 TiB", 5, millis, inPool(little, nothing)),
		limit("clone", "clone of a volume of 1 TiB that is open and holds 1 GiB", 5, millis, inPool(little, clone)),
		limit("restore", "restore of a snapshot of a volume of 1 TiB that is open and fully mapped", 5, millis, inPool(all, restore)),
		limit("clone-mapped", "clone of that volume: it takes a snapshot first", 0, millis, inPool(all, clone)),
		limit("idle-export", fmt.Sprintf("memory of one of %d idle exports", s.exports), 256, kib, idleExports),
	}
}

// openShared opens an image that others may have open.
func openShared(ctx context.Context, path string) (*qcow2.Image, error) {
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, err
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{ReadOnly: true})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return im, nil
}

func openLarge(ctx context.Context, e *env) (float64, error) {
	path, err := e.mappedImage(ctx, e.large)
	if err != nil {
		return 0, err
	}
	tables, err := cache.New(cache.Options{})
	if err != nil {
		return 0, err
	}
	defer tables.Close()
	begin := time.Now()
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		return 0, err
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{Cache: tables})
	if err != nil {
		return 0, errors.Join(err, f.Close())
	}
	took := time.Since(begin)
	return float64(took) / 1e6, im.Close()
}

// idleExports lets a process of its own serve many images to clients that do
// nothing, and returns its memory beyond the cache for each.
func idleExports(ctx context.Context, e *env) (figure float64, err error) {
	dir := e.path("idle")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	err = e.helper(ctx, func(said string) (err error) {
		figure, err = strconv.ParseFloat(said, 64)
		return err
	}, "idle", dir, strconv.Itoa(e.exports))
	return figure, err
}

// serveIdle is the role "idle": it serves many images, each of which has been
// read and written, and prints the memory of each beyond the cache in KiB.
func serveIdle(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("idle: want a directory and a number, got %q", args)
	}
	count, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	const budget = 16 << 20
	tables, err := cache.New(cache.Options{Bytes: budget})
	if err != nil {
		return err
	}
	before, err := residentBytes()
	if err != nil {
		return err
	}
	var clients []net.Conn // a connection that nobody refers to would be closed
	for i := range count {
		client, err := serveOne(ctx, tables, filepath.Join(args[0], strconv.Itoa(i)+".qcow2"))
		if err != nil {
			return err
		}
		clients = append(clients, client)
	}
	debug.FreeOSMemory()
	after, err := residentBytes()
	if err != nil {
		return err
	}
	fmt.Println(float64(after-before) / 1024 / float64(count))
	io.Copy(io.Discard, os.Stdin) // its end is what counts
	runtime.KeepAlive(clients)
	return nil
}

// serveOne serves a new image, with the cache that all share, to a client that
// sends a write and a flush, and no more. It returns the client's end.
func serveOne(ctx context.Context, tables *cache.Cache, path string) (net.Conn, error) {
	created, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	f, err := qcow2.NewOSFile(created, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		return nil, err
	}
	if err := qcow2.Create(ctx, f, 1<<40, qcow2.CreateOptions{}); err != nil {
		return nil, err
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{Cache: tables})
	if err != nil {
		return nil, err
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(file); err != nil {
			return nil, err
		}
		file.Close() // the connection has a duplicate
	}
	export := &nbdexport.Export{Backend: imagebackend.New(im, imagebackend.Options{})}
	go nbdexport.ServeTransmission(ctx, ends[0], export) // ends with the process
	for _, r := range []nbdtest.Request{
		{Type: nbdtest.CmdWrite, Off: 1 << 20, Len: 4096, Payload: make([]byte, 4096)},
		{Type: nbdtest.CmdFlush},
	} {
		if _, err := ends[1].Write(r.Encode(false)); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(ends[1], make([]byte, 16)); err != nil {
			return nil, err
		}
	}
	return ends[1], nil
}

// residentBytes returns the memory of this process that is not files'.
func residentBytes() (int64, error) {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	var total, resident, shared int64
	if _, err := fmt.Sscan(string(text), &total, &resident, &shared); err != nil {
		return 0, err
	}
	return (resident - shared) * int64(os.Getpagesize()), nil
}
