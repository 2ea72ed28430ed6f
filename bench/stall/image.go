package main

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"

	"csi-qcow2/cache"
	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
)

// cacheBytes is the budget of a node agent.
const cacheBytes = 64 << 20

// create makes the image: every table is there, of the data nothing.
func create(ctx context.Context, path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
	if err != nil {
		return err
	}
	err = qcow2.Create(ctx, f, size, qcow2.CreateOptions{Preallocation: qcow2.PreallocationMetadata})
	return errors.Join(err, f.Close())
}

// An attached image is open as a node agent opens it, and exported.
type attached struct {
	image   *qcow2.Image
	cache   *cache.Cache
	clients []*client
	stop    context.CancelFunc
	ended   []chan struct{}
}

// attach opens the image with a cache in an arena file beside it, and connects clients.
func attach(ctx context.Context, path string, clients int) (_ *attached, err error) {
	a := &attached{}
	ctx, a.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	a.cache, err = cache.New(cache.Options{Bytes: cacheBytes, Path: filepath.Join(filepath.Dir(path), "arena"), Fresh: true})
	if err != nil {
		return nil, err
	}
	a.goOn(func() { _ = a.cache.Run(ctx) }) // ends with ctx
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		return nil, err
	}
	a.image, err = qcow2.Open(ctx, f, qcow2.Options{Cache: a.cache, ID: [16]byte{1}, PassDiscard: true})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	server := nbdexport.NewServer(nbdexport.ServerOptions{})
	if err := server.AddExport(&nbdexport.Export{Backend: imagebackend.New(a.image, imagebackend.Options{})}); err != nil {
		return nil, err
	}
	socket := filepath.Join(filepath.Dir(path), "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	a.goOn(func() { _ = server.Serve(ctx, l) }) // ends with ctx
	for range clients {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return nil, err
		}
		c, err := newClient(conn)
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		a.clients = append(a.clients, c)
	}
	return a, nil
}

// goOn runs f until close waits for its end.
func (a *attached) goOn(f func()) {
	ended := make(chan struct{})
	a.ended = append(a.ended, ended)
	go func() {
		defer close(ended)
		f()
	}()
}

func (a *attached) close() error {
	var errs []error
	for _, c := range a.clients {
		errs = append(errs, c.conn.Close())
	}
	a.stop()
	for _, ended := range a.ended {
		<-ended
	}
	if a.image != nil {
		errs = append(errs, a.image.Close())
	}
	if a.cache != nil {
		errs = append(errs, a.cache.Close())
	}
	return errors.Join(errs...)
}
