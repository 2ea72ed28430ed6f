package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// A server is a program that serves an image over NBD on a unix socket.
type server struct {
	name string
	raw  bool // it serves the raw file, not the qcow2 image
	args func(e *env, image, socket string) []string
}

// oursServer is our side.
var oursServer = server{name: "csi-qcow2", args: func(e *env, image, socket string) []string {
	return []string{e.bin, "nbd", "-t", "-e", "0", "-f", "qcow2", "-k", socket, image}
}}

// nbdkitServer is the price of the transport alone.
var nbdkitServer = server{name: "nbdkit file, raw", raw: true, args: func(_ *env, image, socket string) []string {
	return []string{"nbdkit", "-f", "-U", socket, "file", image}
}}

// qemuNBD returns qemu-nbd with flags.
func qemuNBD(flags ...string) server {
	return server{name: strings.Join(append([]string{"qemu-nbd"}, flags...), " "), args: func(_ *env, image, socket string) []string {
		return append([]string{"qemu-nbd", "-t", "-e", "16", "-f", "qcow2", "-k", socket, image}, flags...)
	}}
}

// storageDaemon returns qemu-storage-daemon with options of its file node. It has
// no iothread: with one, 7.2 ends with a failed assertion when a client leaves.
func storageDaemon(file string) server {
	name := "qemu-storage-daemon"
	if file != "" {
		name += " " + file
		file = "," + file
	}
	return server{name: name, args: func(_ *env, image, socket string) []string {
		return []string{
			"qemu-storage-daemon", "--blockdev", "driver=file,node-name=file,filename=" + image + file,
			"--blockdev", "driver=qcow2,node-name=disk,file=file",
			"--nbd-server", "addr.type=unix,addr.path=" + socket + ",max-connections=0",
			"--export", "nbd,id=export,node-name=disk,name=,writable=on",
		}
	}}
}

// qemuServers are QEMU's servers with the flags that may be their best.
var qemuServers = []server{
	qemuNBD(),
	qemuNBD("--aio=io_uring"),
	qemuNBD("--cache=none", "--aio=native"),
	storageDaemon(""),
	storageDaemon("aio=io_uring"),
}

// serve runs s on image while do is under way. do gets the URI of the export.
func (e *env) serve(ctx context.Context, s server, image string, do func(uri string) error) (err error) {
	socket := e.path("socket")
	os.Remove(socket) // of a server that was killed; it may not exist
	args := s.args(e, image, socket)
	var stderr bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the process, which is ended below
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM) // fails only when it has ended
		select {
		case <-ended:
		case <-time.After(time.Minute):
			cmd.Process.Kill()
			<-ended
			err = errors.Join(err, fmt.Errorf("%s does not end", args[0]))
		}
	}()
	for {
		up, err := listening(socket)
		if err != nil {
			return err
		}
		if up {
			return do("nbd+unix:///?socket=" + socket)
		}
		select {
		case err := <-ended:
			ended <- err
			return fmt.Errorf("%s ended: %v: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// listening reports whether somebody listens on the unix socket path, without
// connecting: qemu-storage-daemon ends when its first client says nothing.
func listening(path string) (bool, error) {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return false, err
	}
	const acceptsConnections = "00010000" // __SO_ACCEPTCON, in the fourth column
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) == 8 && words[7] == path && words[3] == acceptsConnections {
			return true, nil
		}
	}
	return false, nil
}
