package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"csi-qcow2/cache"
	"csi-qcow2/volume"
)

// poolSource is the name of the volume that others are made of, and of its
// snapshot.
const poolSource = "source"

// inPool returns what measures the creation of one volume in milliseconds. from
// chooses what it is made of: the pool has a volume that is open and holds
// mapped bytes, all of it or little, and a snapshot of that.
func inPool(mapped int64, from func(p *volume.Pool) volume.Source) func(context.Context, *env) (float64, error) {
	return func(ctx context.Context, e *env) (_ float64, err error) {
		dir, err := os.MkdirTemp(e.dir, "pool-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		tables, err := cache.New(cache.Options{Bytes: 64 << 20})
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, tables.Close()) }()
		p, err := volume.Open(ctx, dir, volume.Options{Cache: tables})
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, p.Close()) }()
		disk, err := e.fillPool(ctx, p, mapped)
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, disk.Close()) }()

		const rounds = 5
		begin := time.Now()
		for i := range rounds {
			request := volume.CreateRequest{Name: strconv.Itoa(i), Size: volume.SizeRange{Required: e.volume}, Source: from(p)}
			if _, err := p.Create(ctx, request); err != nil {
				return 0, err
			}
		}
		return float64(time.Since(begin)) / rounds / 1e6, nil
	}
}

// fillPool makes the source, opens it, and takes its snapshot.
func (e *env) fillPool(ctx context.Context, p *volume.Pool, mapped int64) (*volume.Disk, error) {
	v, err := p.Create(ctx, volume.CreateRequest{Name: poolSource, Size: volume.SizeRange{Required: e.volume}})
	if err != nil {
		return nil, err
	}
	if mapped == e.volume {
		image, err := e.mappedImage(ctx, e.volume)
		if err != nil {
			return nil, err
		}
		if err := command(ctx, "cp", "--sparse=auto", image, filepath.Join(p.Path(), "volumes", v.ID, "disk.qcow2")); err != nil {
			return nil, err
		}
	}
	disk, err := p.Open(ctx, v.ID)
	if err != nil {
		return nil, err
	}
	if mapped < e.volume {
		for off := int64(0); off < mapped && err == nil; off += 64 << 10 {
			_, err = disk.Image.WriteAt([]byte{1}, off)
		}
	}
	if err == nil {
		_, err = p.CreateSnapshot(ctx, poolSource, v.ID)
	}
	if err != nil {
		return nil, errors.Join(err, disk.Close())
	}
	return disk, nil
}
