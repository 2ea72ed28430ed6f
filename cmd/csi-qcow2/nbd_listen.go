package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"syscall"
)

// nbdListenFlags say where the nbd subcommand listens: on a unix socket, or a
// TCP port, or on the socket that its parent passed on.
type nbdListenFlags struct {
	socket string
	port   string
	bind   string
}

// maxSocketPath is what fits into a sockaddr_un, in bytes.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// validate refuses a port that is none, and a path that is too long for a socket.
func (f *nbdListenFlags) validate() error {
	if len(f.socket) > maxSocketPath {
		return usageErrorf("nbd: --socket %q: the path has %d bytes, at most %d fit", f.socket, len(f.socket), maxSocketPath)
	}
	if _, err := strconv.ParseUint(f.port, 10, 16); err != nil {
		return usageErrorf("nbd: --port %q: want a number from 0 to 65535", f.port)
	}
	return nil
}

// listen starts to listen.
func (f *nbdListenFlags) listen(ctx context.Context) (net.Listener, error) {
	if l, err := inheritedListener(); l != nil || err != nil {
		return l, err
	}
	var config net.ListenConfig
	if f.socket == "" {
		l, err := config.Listen(ctx, "tcp", net.JoinHostPort(f.bind, f.port))
		if err != nil {
			return nil, fmt.Errorf("nbd: %w", err)
		}
		return l, nil
	}
	// As qemu-nbd does, but only a socket is replaced: nothing that may be
	// worth something. The listener removes its own when it is closed.
	if st, err := os.Lstat(f.socket); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if err := os.Remove(f.socket); err != nil {
			return nil, fmt.Errorf("nbd: replace socket: %w", err)
		}
	}
	l, err := config.Listen(ctx, "unix", f.socket)
	if err != nil {
		return nil, fmt.Errorf("nbd: %w", err)
	}
	return l, nil
}

// inheritedListener returns the socket of a parent that uses socket activation
// (LISTEN_PID and LISTEN_FDS, see sd_listen_fds(3)), or nil.
func inheritedListener() (net.Listener, error) {
	if os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	if n := os.Getenv("LISTEN_FDS"); n != "1" {
		return nil, fmt.Errorf("nbd: LISTEN_FDS is %q: want one socket", n)
	}
	const firstFD = 3
	file := os.NewFile(firstFD, "LISTEN_FDS")
	if file == nil {
		return nil, errors.New("nbd: LISTEN_FDS: file descriptor 3 is not open")
	}
	defer file.Close() // the listener has a duplicate
	l, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("nbd: LISTEN_FDS: %w", err)
	}
	return l, nil
}
