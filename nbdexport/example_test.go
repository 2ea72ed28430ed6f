package nbdexport_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"csi-qcow2/nbdexport"
	"csi-qcow2/nbdexport/nbdtest"
)

// Serve a backend on a unix socket until the context ends.
func ExampleServer() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	listener, err := net.Listen("unix", filepath.Join(dir, "nbd.sock"))
	if err != nil {
		fmt.Println(err)
		return
	}
	server := nbdexport.NewServer(nbdexport.ServerOptions{MaxConnections: 16})
	err = server.AddExport(&nbdexport.Export{
		Name:        "scratch",
		Description: "a disk that forgets",
		Backend:     nbdtest.NewMemory(64 << 20),
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // a real server waits for a signal
	fmt.Println(server.Serve(ctx, listener))
	// Output: nbdexport: server closed: context canceled
}
