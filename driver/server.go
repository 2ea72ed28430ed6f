package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// maxSocketPath is what fits into a sockaddr_un, in bytes.
const maxSocketPath = 107

// ParseEndpoint returns the socket path of an endpoint: unix:///path,
// unix://path or /path, absolute.
func ParseEndpoint(endpoint string) (string, error) {
	path := strings.TrimPrefix(strings.TrimPrefix(endpoint, "unix:"), "//")
	switch {
	case !filepath.IsAbs(path):
		return "", fmt.Errorf("endpoint %q: want unix:// and an absolute path", endpoint)
	case len(path) > maxSocketPath:
		return "", fmt.Errorf("endpoint %q: the path has %d bytes, at most %d fit", endpoint, len(path), maxSocketPath)
	}
	return filepath.Clean(path), nil
}

// Listen makes the socket path, for root only. A socket that nobody listens on
// any more is replaced; one that somebody does is left alone.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("endpoint %q exists and is no socket", path)
		}
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			conn.Close()
			return nil, fmt.Errorf("endpoint %q is served by another process; stop it first", path)
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// Serve answers RPCs on l until ctx ends. Then it refuses new ones and waits
// for those under way, at most drain. It closes l, which removes the socket.
func (d *Driver) Serve(ctx context.Context, l net.Listener, drain time.Duration) error {
	s := grpc.NewServer(d.ServerOptions()...)
	d.Register(s)
	return d.serve(ctx, s, l, drain)
}
