package main

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"time"

	"csi-qcow2/qcow2"
)

func toolLines() []*line {
	return []*line{convertLine(), convertOverlayLine(), snapshotLine(), checkLine()}
}

// A tool is a program with qemu-img's command line.
type tool func(e *env) string

func oursImg(e *env) string { return e.bin + " img" }
func qemuImg(*env) string   { return "qemu-img" }

// timed returns a contestant that runs a tool and measures its time. args
// prepares and returns the tool's arguments.
func timed(name string, t tool, u unit, args func(ctx context.Context, e *env) ([]string, error)) contestant {
	return contestant{name, func(ctx context.Context, e *env) (float64, error) {
		rest, err := args(ctx, e)
		if err != nil {
			return 0, err
		}
		words := append(strings.Fields(t(e)), rest...)
		cmd := exec.CommandContext(ctx, words[0], words[1:]...)
		begin := time.Now()
		if err := run(cmd); err != nil {
			return 0, err
		}
		if u == cpuSeconds {
			return (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(), nil
		}
		return time.Since(begin).Seconds(), nil
	}}
}

func convertLine() *line {
	convert := func(flags ...string) func(ctx context.Context, e *env) ([]string, error) {
		return func(ctx context.Context, e *env) ([]string, error) {
			image, err := e.fullImage(ctx)
			if err != nil {
				return nil, err
			}
			target := e.path("converted.qcow2")
			os.Remove(target) // of the turn before; the first has none
			return append(append([]string{"convert", "-f", "qcow2", "-O", "qcow2"}, flags...), image, target), nil
		}
	}
	var best []contestant
	for _, flags := range [][]string{{"-W", "-m", "16"}, {"-W"}, {"-m", "16"}, {"-W", "-m", "4"}} {
		best = append(best, timed("qemu-img convert "+strings.Join(flags, " "), qemuImg, seconds, convert(flags...)))
	}
	return &line{
		name: "convert-full", group: "tools", unit: seconds, title: "convert of a full 2 GiB image",
		ours: timed("csi-qcow2", oursImg, seconds, convert()),
		peers: []peer{
			{"qemu-img", []contestant{timed("qemu-img", qemuImg, seconds, convert())}, 3.0},
			{"qemu-img, best flags", best, 1.0},
		},
	}
}

func convertOverlayLine() *line {
	convert := func(ctx context.Context, e *env) ([]string, error) {
		top, err := e.overlayImage(ctx)
		if err != nil {
			return nil, err
		}
		target := e.path("converted.qcow2")
		os.Remove(target) // of the turn before; the first has none
		return []string{"convert", "-f", "qcow2", "-O", "qcow2", top, target}, nil
	}
	return &line{
		name: "convert-overlay", group: "tools", unit: cpuSeconds, title: "convert of a 1 TiB overlay with 1.1 GiB of data, CPU time",
		ours:  timed("csi-qcow2", oursImg, cpuSeconds, convert),
		peers: []peer{{"qemu-img", []contestant{timed("qemu-img", qemuImg, cpuSeconds, convert)}, 1.5}},
	}
}

// overlayImage returns an overlay of a large image; both hold some data, in
// many places.
func (e *env) overlayImage(ctx context.Context) (string, error) {
	const run = 1 << 20
	fill := func(path string, bytes, first int64) error {
		f, err := qcow2.OpenFile(path, qcow2.FileOptions{})
		if err != nil {
			return err
		}
		im, err := qcow2.Open(ctx, f, qcow2.Options{OpenBacking: func(context.Context, string, string) (qcow2.Disk, error) {
			return openShared(ctx, e.path("base.qcow2"))
		}})
		if err != nil {
			return err
		}
		defer im.Close()
		raw, err := os.Open(e.path("full.raw"))
		if err != nil {
			return err
		}
		defer raw.Close()
		buf := make([]byte, run)
		count := max(bytes/run, 1)
		for i := range count {
			if _, err := raw.ReadAt(buf, i*run%e.full); err != nil {
				return err
			}
			if _, err := im.WriteAt(buf, (first+i*(e.overlay/count))&^(run-1)); err != nil {
				return err
			}
		}
		return im.Flush()
	}
	if _, err := e.fullRaw(); err != nil {
		return "", err
	}
	base, err := e.image("base.qcow2", func(path string) error {
		if err := e.emptyImage(ctx, path, e.overlay); err != nil {
			return err
		}
		return fill(path, e.full/2, 0)
	})
	if err != nil {
		return "", err
	}
	return e.image("overlay.qcow2", func(path string) error {
		if err := command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path); err != nil {
			return err
		}
		return fill(path, e.full/20, 16<<20)
	})
}

func snapshotLine() *line {
	return &line{
		name: "snapshot-2t", group: "tools", unit: seconds, title: "snapshot create, 2 TiB fully mapped",
		ours:  timed("csi-qcow2", oursImg, seconds, snapshotOf(func(e *env) int64 { return e.large })),
		peers: []peer{{"qemu-img", []contestant{timed("qemu-img", qemuImg, seconds, snapshotOf(func(e *env) int64 { return e.large }))}, 10}},
	}
}

// snapshotOf makes a copy of a mapped image, to take a snapshot of.
func snapshotOf(size func(*env) int64) func(ctx context.Context, e *env) ([]string, error) {
	return func(ctx context.Context, e *env) ([]string, error) {
		image, err := e.mappedImage(ctx, size(e))
		if err != nil {
			return nil, err
		}
		target := e.path("snapshot.qcow2")
		if err := command(ctx, "cp", "--sparse=auto", image, target); err != nil {
			return nil, err
		}
		return []string{"snapshot", "-c", "one", target}, nil
	}
}

func checkLine() *line {
	check := func(ctx context.Context, e *env) ([]string, error) {
		image, err := e.mappedImage(ctx, e.large)
		return []string{"check", "-f", "qcow2", image}, err
	}
	return &line{
		name: "check-2t", group: "tools", unit: seconds, title: "check, 2 TiB fully mapped",
		ours:  timed("csi-qcow2", oursImg, seconds, check),
		peers: []peer{{"qemu-img", []contestant{timed("qemu-img", qemuImg, seconds, check)}, 2.0}},
	}
}
