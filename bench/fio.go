package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// A load is what fio does.
type load struct {
	rw     string // read, write, randread, randwrite
	block  string // size of a request
	align  string // of random requests; "" means their size
	depth  int
	jobs   int
	fsync  bool // after each write
	once   bool // no block is written twice
	stream bool // the figure is MB/s
}

// args returns fio's arguments, less where the load goes.
func (l load) args(d time.Duration) []string {
	args := []string{
		"--name=load", "--output-format=json", "--rw=" + l.rw, "--bs=" + l.block,
		fmt.Sprintf("--iodepth=%d", l.depth), fmt.Sprintf("--numjobs=%d", max(l.jobs, 1)),
		"--thread", "--group_reporting", "--randrepeat=0", fmt.Sprintf("--runtime=%dms", d.Milliseconds()),
	}
	if l.align != "" {
		args = append(args, "--blockalign="+l.align)
	}
	if l.fsync {
		args = append(args, "--fsync=1")
	}
	if !l.once {
		args = append(args, "--time_based", "--norandommap")
	}
	return args
}

// nbd returns the arguments for the export at uri.
func (l load) nbd(uri string, d time.Duration) []string {
	return append(l.args(d), "--ioengine=nbd", "--uri="+uri)
}

// device returns the arguments for a block device.
func (l load) device(path string, d time.Duration) []string {
	return append(l.args(d), "--ioengine=libaio", "--direct=1", "--filename="+path)
}

// fio runs fio and returns IOPS or MB/s.
func fio(ctx context.Context, l load, args []string) (float64, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "fio", args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("fio %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	type direction struct {
		IOPS  float64 `json:"iops"`
		Bytes float64 `json:"bw_bytes"`
	}
	var report struct {
		Jobs []struct {
			Error       int
			Read, Write direction
		}
	}
	text := stdout.Bytes()
	if i := bytes.IndexByte(text, '{'); i > 0 { // its engine's remarks come first
		text = text[i:]
	}
	if err := json.Unmarshal(text, &report); err != nil || len(report.Jobs) != 1 || report.Jobs[0].Error != 0 {
		return 0, fmt.Errorf("fio %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	d := report.Jobs[0].Read
	if strings.Contains(l.rw, "write") {
		d = report.Jobs[0].Write
	}
	if l.stream {
		return d.Bytes / 1e6, nil
	}
	return d.IOPS, nil
}
