package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/internal/imagefile"
	"csi-qcow2/nbdexport"
)

func deviceLines() []*line {
	l := load{rw: "randread", block: "4k", depth: 32}
	through := func(name string, device func(ctx context.Context, e *env, do func(path string) error) error) contestant {
		return contestant{name, func(ctx context.Context, e *env) (figure float64, err error) {
			err = device(ctx, e, func(path string) (err error) {
				figure, err = fio(ctx, l, l.device(path, e.time))
				return err
			})
			return figure, err
		}}
	}
	return []*line{{
		name: "device-fuse", group: "device", unit: iops, title: "4 KiB random read, direct, FUSE and loop, queue depth 32",
		ours:  through("csi-qcow2", oursDevice),
		peers: []peer{{"nbdfuse, qemu-nbd, loop", []contestant{through("nbdfuse, qemu-nbd, loop", nbdfuseDevice)}, 3.0}},
	}}
}

// oursDevice lets a process of its own make a device of the full image.
func oursDevice(ctx context.Context, e *env, do func(path string) error) error {
	image, err := e.fullImage(ctx)
	if err != nil {
		return err
	}
	return e.helper(ctx, do, "device", image, e.path("run"))
}

// serveDevice is the role "device": it makes a device of an image until its
// standard input ends.
func serveDevice(ctx context.Context, args []string) (err error) {
	if len(args) != 2 {
		return fmt.Errorf("device: want an image and a directory, got %q", args)
	}
	disk, _, err := imagefile.Open(ctx, args[0], imagefile.Options{Format: "qcow2"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	attacher, err := nbdexport.NewAttacher(nbdexport.KindFUSE, nbdexport.AttacherOptions{RunDir: args[1]})
	if err != nil {
		return err
	}
	device, err := attacher.Attach(ctx, imagebackend.New(disk, imagebackend.Options{}), nbdexport.DeviceOptions{ID: "bench"})
	if err != nil {
		return err
	}
	fmt.Println(device.Path())
	io.Copy(io.Discard, os.Stdin) // its end is what counts
	return device.Detach(context.WithoutCancel(ctx))
}

// nbdfuseDevice makes a device of the full image as one can without us.
func nbdfuseDevice(ctx context.Context, e *env, do func(path string) error) error {
	image, err := e.fullImage(ctx)
	if err != nil {
		return err
	}
	dir := e.path("nbdfuse")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return e.serve(ctx, qemuNBD(), image, func(uri string) (err error) {
		file := filepath.Join(dir, "disk")
		fuse := exec.Command("nbdfuse", file, uri)
		if err := fuse.Start(); err != nil {
			return err
		}
		defer func() {
			err = errors.Join(err, command(context.WithoutCancel(ctx), "fusermount3", "-u", dir), fuse.Wait())
		}()
		for {
			if _, err := os.Stat(file); err == nil {
				break
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(5 * time.Millisecond):
			}
		}
		out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--direct-io=on", file).Output()
		if err != nil {
			return fmt.Errorf("losetup %s: %w", file, err)
		}
		loop := strings.TrimSpace(string(out))
		defer func() { err = errors.Join(err, command(context.WithoutCancel(ctx), "losetup", "--detach", loop)) }()
		return do(loop)
	})
}

// helper runs this program in a role, while do is under way with the line that
// it has printed.
func (e *env) helper(ctx context.Context, do func(line string) error, role string, args ...string) error {
	cmd := exec.Command(e.self, append([]string{"-role", role}, args...)...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	said, err := bufio.NewReader(stdout).ReadString('\n')
	if err == nil {
		err = do(strings.TrimSpace(said))
	}
	stdin.Close() // tells it to end
	return errors.Join(err, cmd.Wait())
}

// playRole runs what helper asked for.
func playRole(ctx context.Context, role string, args []string) error {
	switch role {
	case "device":
		return serveDevice(ctx, args)
	case "idle":
		return serveIdle(ctx, args)
	}
	return fmt.Errorf("-role %q: want device or idle", role)
}
