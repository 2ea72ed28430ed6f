package qcow2_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"csi-qcow2/qcow2"
)

// createExample makes an image of 1 GiB in a new directory.
func createExample(ctx context.Context) (path string, remove func()) {
	dir, err := os.MkdirTemp("", "qcow2-example")
	if err != nil {
		log.Fatal(err)
	}
	path = filepath.Join(dir, "disk.qcow2")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		log.Fatal(err)
	}
	f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	if err := qcow2.Create(ctx, f, 1<<30, qcow2.CreateOptions{}); err != nil {
		log.Fatal(err)
	}
	return path, func() { os.RemoveAll(dir) }
}

func ExampleCreate() {
	path, remove := createExample(context.Background())
	defer remove()
	info, err := os.Stat(path)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("1 GiB in a file of", info.Size()>>10, "KiB")
	// Output: 1 GiB in a file of 256 KiB
}

func ExampleOpen() {
	ctx := context.Background()
	path, remove := createExample(ctx)
	defer remove()

	f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		log.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	if _, err := im.WriteAt([]byte("hello"), 1<<20); err != nil {
		log.Fatal(err)
	}
	if err := im.Flush(); err != nil { // durable from here on
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := im.ReadAt(p, 1<<20); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: hello
}

func ExampleImage_Check() {
	ctx := context.Background()
	path, remove := createExample(ctx)
	defer remove()

	f, err := qcow2.OpenFile(path, qcow2.FileOptions{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{ReadOnly: true})
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	result, err := im.Check(ctx, qcow2.CheckOptions{
		Report: func(p qcow2.Problem) { fmt.Println(p.Msg) },
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("clean:", result.Clean())
	// Output: clean: true
}

func ExampleImage_CreateSnapshot() {
	ctx := context.Background()
	path, remove := createExample(ctx)
	defer remove()

	f, err := qcow2.OpenFile(path, qcow2.FileOptions{Lock: qcow2.LockWrite})
	if err != nil {
		log.Fatal(err)
	}
	im, err := qcow2.Open(ctx, f, qcow2.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer im.Close()
	if _, err := im.WriteAt([]byte("before"), 0); err != nil {
		log.Fatal(err)
	}
	s, err := im.CreateSnapshot(ctx, qcow2.Snapshot{Name: "backup"})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := im.WriteAt([]byte("after "), 0); err != nil {
		log.Fatal(err)
	}
	if err := im.ApplySnapshot(ctx, s.ID); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 6)
	if _, err := im.ReadAt(p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("snapshot %s: %s\n", s.ID, p)
	// Output: snapshot 1: before
}
