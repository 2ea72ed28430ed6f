package main

import (
	"context"
	"fmt"
	"strconv"
)

// growthLines measure the same work at growing sizes.
func growthLines(s sizes) []*line {
	read := load{rw: "randread", block: "4k", depth: 32}
	mapped := func(size int64) place {
		return func(ctx context.Context, e *env, _ bool) (string, error) { return e.mappedImage(ctx, size) }
	}
	bySize := func(name, title string, u unit, of func(size int64) (ours, theirs contestant)) *line {
		c := &curve{axis: "virtual size in GiB", at: func(i int) (contestant, contestant) { return of(s.growth[i]) }}
		for _, size := range s.growth {
			c.labels = append(c.labels, strconv.FormatFloat(float64(size)/(1<<30), 'g', 4, 64))
		}
		return &line{name: name, group: "growth", title: title, unit: u, curve: c}
	}
	tools := func(args func(size int64) func(ctx context.Context, e *env) ([]string, error)) func(size int64) (ours, theirs contestant) {
		return func(size int64) (ours, theirs contestant) {
			return timed("csi-qcow2", oursImg, seconds, args(size)), timed("qemu-img", qemuImg, seconds, args(size))
		}
	}
	depth := &curve{axis: "images in the chain", kept: 0.8, at: func(i int) (ours, theirs contestant) {
		n := s.depths[i]
		p := func(ctx context.Context, e *env, _ bool) (string, error) { return e.chain(ctx, n) }
		return loaded(oursServer, p, read), loaded(qemuNBD(), p, read)
	}}
	for _, n := range s.depths {
		depth.labels = append(depth.labels, strconv.Itoa(n))
	}
	return []*line{
		bySize("growth-read", "4 KiB random read all over a mapped image, queue depth 32", iops, func(size int64) (ours, theirs contestant) {
			return loaded(oursServer, mapped(size), read), loaded(qemuNBD(), mapped(size), read)
		}),
		bySize("growth-snapshot", "snapshot create, fully mapped", seconds, tools(func(size int64) func(context.Context, *env) ([]string, error) {
			return snapshotOf(func(*env) int64 { return size })
		})),
		bySize("growth-check", "check, fully mapped", seconds, tools(func(size int64) func(context.Context, *env) ([]string, error) {
			return func(ctx context.Context, e *env) ([]string, error) {
				image, err := e.mappedImage(ctx, size)
				return []string{"check", "-f", "qcow2", image}, err
			}
		})),
		{name: "growth-depth", group: "growth", title: "4 KiB random read through a chain whose base holds the data, queue depth 32", unit: iops, curve: depth},
	}
}

// chain returns the top of a chain of n images, whose base is the full image.
func (e *env) chain(ctx context.Context, n int) (string, error) {
	below, err := e.fullImage(ctx)
	if err != nil {
		return "", err
	}
	for i := 2; i <= n; i++ {
		backing := below
		if below, err = e.image(fmt.Sprintf("chain-%d.qcow2", i), func(path string) error {
			return command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, path)
		}); err != nil {
			return "", err
		}
	}
	return below, nil
}
