package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"csi-qcow2/volume"
)

// TestNodeFlagsRefused: a bad value ends the program with status 2 and a
// message that names the flag, before anything is touched.
func TestNodeFlagsRefused(t *testing.T) {
	for _, args := range [][]string{
		{"--endpoint", "tcp://1.2.3.4:5"},
		{"--endpoint", "unix://relative/sock"},
		{"--endpoint", "unix:///" + strings.Repeat("x", 200)},
		{"--pool", "nodir"},
		{"--pool", "a=relative"},
		{"--pool", "A=/x"},
		{"--pool", "=/x"},
		{"--pool", "a=/x", "--pool", "a=/y"},
		{"--pool", "a=/x", "--pool", "b=/x/"},
		{"--node-id", ""},
		{"--node-id", strings.Repeat("x", 257)},
		{"--run-dir", "relative"},
		{"--device", "ublk"},
		{"--driver-name", "-x"},
		{"--driver-name", strings.Repeat("x", 64)},
		{"--cache-bytes", "1"},
		{"--cache-bytes", "-1"},
		{"--cache-bytes", "64M"},
		{"--max-volumes", "-1"},
		{"--drain-timeout", "0s"},
		{"--drain-timeout", "2h"},
		{"--dead-connection-timeout", "0s"},
		{"--dead-connection-timeout", "1500ms"},
		{"--dead-connection-timeout", "25h"},
		{"--pool-refuse", "150"},
		{"--pool-warn", "-1"},
		{"--pool-stop", "NaN"},
		{"--pool-pause", "48h"},
		{"--pool-pause", "1h", "--pool-stop", "0"},
		{"--overcommit", "-1"},
		{"--verbosity", "11"},
		{"--no-such-flag", "x"},
		{"argument", "x"},
	} {
		var out, errs bytes.Buffer
		code := run(context.Background(), append([]string{"node"}, args...), nil, &out, &errs)
		if code != exitUsage || !strings.Contains(errs.String(), strings.TrimPrefix(args[0], "--")) {
			t.Errorf("%q: exit %d, %q", args, code, errs.String())
		}
	}
}

// TestNodeStartsNothingItCannotServe: an unusable pool or endpoint is an error
// with status 1, and leaves no socket.
func TestNodeStartsNothingItCannotServe(t *testing.T) {
	dir := t.TempDir()
	notPool := filepath.Join(dir, "notpool")
	if err := os.MkdirAll(filepath.Join(notPool, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ pool, want string }{
		{filepath.Join(dir, "absent"), "no such file or directory: make the directory"},
		{file, "not a directory: make the directory"},
		{notPool, "give an empty directory"},
	} {
		var out, errs bytes.Buffer
		socket := filepath.Join(dir, "s")
		code := run(context.Background(), []string{"node", "--endpoint", "unix://" + socket, "--pool", "default=" + c.pool,
			"--run-dir", filepath.Join(dir, "run"), "--node-id", "n"}, nil, &out, &errs)
		if code != exitError || !strings.Contains(errs.String(), c.want) || !strings.Contains(errs.String(), c.pool) {
			t.Errorf("pool %q: exit %d, %q", c.pool, code, errs.String())
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("pool %q: a socket is left: %v", c.pool, err)
		}
	}
}

// TestPoolFlagsReachThePools: what the flags say of pools is what pools are opened with.
func TestPoolFlagsReachThePools(t *testing.T) {
	f := defaultNodeFlags()
	flags := pflag.NewFlagSet("node", pflag.ContinueOnError)
	f.add(flags)
	err := flags.Parse([]string{"--copy-bandwidth", "1000", "--overcommit", "3", "--pool-warn", "25", "--pool-refuse", "50", "--pool-stop", "75", "--pool-pause", "1h"})
	if err := errors.Join(err, f.validate()); err != nil {
		t.Fatal(err)
	}
	want := volume.Guard{Overcommit: 3, WarnAt: 0.25, RefuseAt: 0.5, StopAt: 0.75, Pause: time.Hour}
	if o := f.poolOptions(nil); o.CopyBandwidth != 1000 || o.Guard != want {
		t.Errorf("got a bandwidth of %d and %+v, want 1000 and %+v", o.CopyBandwidth, o.Guard, want)
	}
}
