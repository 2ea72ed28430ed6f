package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"csi-qcow2/internal/imagebackend"
	"csi-qcow2/internal/imagefile"
	"csi-qcow2/nbdexport"
	"csi-qcow2/qcow2"
)

// nbdFlags are the flags of the nbd subcommand, as qemu-nbd has them.
type nbdFlags struct {
	listen      nbdListenFlags
	persistent  bool
	readOnly    bool
	format      string
	shared      int
	name        string
	description string
	snapshot    string
	cache       string
	noCache     bool
	discard     string
	pidFile     string
	runDir      string
	verbose     bool
}

func newNBDCommand() *cobra.Command {
	var f nbdFlags
	cmd := &cobra.Command{
		Use:   "nbd [flags] FILE",
		Short: "Serve an image over NBD, with the flags of qemu-nbd",
		Long: `Serve an image over NBD, with the flags of qemu-nbd.

Without -t the process ends when the last client has gone. SIGTERM or SIGINT
end it after the requests under way, and the image is flushed.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErrorf("nbd: want one image file, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := f.imageOptions()
			if err != nil {
				return err
			}
			f.setVerbosity()
			return serveNBD(cmd.Context(), &f, args[0], o)
		},
	}
	fl := cmd.Flags()
	fl.SortFlags = false
	fl.StringVarP(&f.listen.socket, "socket", "k", "", "listen on the unix socket `PATH`")
	fl.StringVarP(&f.listen.port, "port", "p", "10809", "listen on the TCP port `PORT`")
	fl.StringVarP(&f.listen.bind, "bind", "b", "0.0.0.0", "address to bind the TCP port to")
	fl.BoolVarP(&f.persistent, "persistent", "t", false, "go on when the last client has gone")
	fl.IntVarP(&f.shared, "shared", "e", 1, "let up to `N` clients connect at once; 0 means any number")
	fl.StringVarP(&f.name, "export-name", "x", "", "export the image by this `NAME`")
	fl.StringVarP(&f.description, "description", "D", "", "describe the export as `TEXT`")
	fl.StringVarP(&f.format, "format", "f", "", "image `FORMAT`, qcow2 or raw; without it the file is probed")
	fl.BoolVarP(&f.readOnly, "read-only", "r", false, "export read-only")
	fl.StringVarP(&f.snapshot, "load-snapshot", "l", "", "export the internal snapshot `ID` or name (also snapshot.id=ID, snapshot.name=NAME), read-only")
	fl.StringVar(&f.cache, "cache", "writeback", "cache `MODE`: writeback, writethrough, none, directsync or unsafe")
	fl.BoolVarP(&f.noCache, "nocache", "n", false, "the same as --cache=none")
	fl.StringVar(&f.discard, "discard", "ignore", "what to do with discards: ignore or unmap")
	fl.BoolP("allocation-depth", "A", false, "accepted for compatibility: qemu:allocation-depth is always offered")
	fl.StringVar(&f.pidFile, "pid-file", "", "write the process ID to `PATH` when ready")
	fl.StringVar(&f.runDir, "run-dir", "", "keep unflushed metadata in `DIR`, on a tmpfs: a server that is killed and started again with the same directory has lost nothing that it acknowledged")
	fl.BoolVarP(&f.verbose, "verbose", "v", false, "report connections on stderr")
	return cmd
}

// imageOptions checks the flags and returns how they want the image opened.
func (f *nbdFlags) imageOptions() (imagefile.Options, error) {
	if f.noCache {
		f.cache = "none"
	}
	mode, ok := imagefile.ParseCacheMode(f.cache)
	if !ok {
		return imagefile.Options{}, usageErrorf("nbd: --cache %q: want writeback, writethrough, none, directsync or unsafe", f.cache)
	}
	switch f.discard {
	case "ignore", "off", "unmap", "on":
	default:
		return imagefile.Options{}, usageErrorf("nbd: --discard %q: want ignore or unmap", f.discard)
	}
	switch f.format {
	case "", "qcow2", "raw":
	default:
		return imagefile.Options{}, usageErrorf("nbd: --format %q: want qcow2 or raw", f.format)
	}
	if f.shared < 0 {
		return imagefile.Options{}, usageErrorf("nbd: --shared %d: want 0 or more", f.shared)
	}
	if err := f.listen.validate(); err != nil {
		return imagefile.Options{}, err
	}
	snapshot, err := parseLoadSnapshot(f.snapshot)
	if err != nil {
		return imagefile.Options{}, err
	}
	f.readOnly = f.readOnly || snapshot != ""
	return imagefile.Options{
		Format:    f.format,
		ReadOnly:  f.readOnly,
		Snapshot:  snapshot,
		CacheMode: mode,
		Discard:   f.passDiscard(),
	}, nil
}

func (f *nbdFlags) passDiscard() bool { return f.discard == "unmap" || f.discard == "on" }

// setVerbosity makes klog report connections, or nothing but errors.
func (f *nbdFlags) setVerbosity() {
	var fs flag.FlagSet
	klog.InitFlags(&fs)
	level := 0
	if f.verbose {
		level = 2
	}
	fs.Set("v", strconv.Itoa(level)) // a number: cannot fail
}

// parseLoadSnapshot returns the ID or name in the argument of -l, which is one
// of ID_OR_NAME, snapshot.id=ID and snapshot.name=NAME.
func parseLoadSnapshot(s string) (string, error) {
	if !strings.HasPrefix(s, "snapshot.") {
		return s, nil
	}
	for _, key := range []string{"snapshot.id=", "snapshot.name="} {
		if value, ok := strings.CutPrefix(s, key); ok && value != "" && !strings.Contains(value, ",") {
			return value, nil
		}
	}
	return "", usageErrorf("nbd: --load-snapshot %q: want an ID or name, snapshot.id=ID or snapshot.name=NAME", s)
}

// serveNBD serves the image file name until ctx ends, or, unless f.persistent,
// until the last client has gone. Then the image is flushed and closed.
func serveNBD(ctx context.Context, f *nbdFlags, name string, o imagefile.Options) error {
	var kept *nbdRunDir
	if f.runDir != "" {
		var err error
		if kept, err = openNBDRunDir(f.runDir, name, &o); err != nil {
			return fmt.Errorf("nbd: %w", err)
		}
	}
	disk, info, err := imagefile.Open(ctx, name, o)
	if err != nil {
		var path *fs.PathError
		if errors.As(err, &path) && path.Op == "open" && path.Path == name {
			err = path.Err // the rest is said here
		}
		return errors.Join(fmt.Errorf("nbd: open %q: %w", name, err), kept.unopened())
	}
	err = serveDisk(ctx, f, name, disk, info, o.CacheMode)
	closeErr := disk.Close()
	if closeErr != nil {
		err = errors.Join(err, fmt.Errorf("nbd: close %q: %w", name, closeErr))
	}
	return errors.Join(err, kept.close(closeErr == nil))
}

// serveDisk is serveNBD for an open image.
func serveDisk(ctx context.Context, f *nbdFlags, name string, disk qcow2.Disk, info imagefile.Info, mode imagefile.CacheMode) error {
	if info.Probed && info.Format == "raw" && !f.readOnly {
		fmt.Fprintf(os.Stderr, "csi-qcow2: warning: format of %q was not given and probing guessed raw; writes to its first sector are restricted: give -f raw\n", name)
	}

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	server := nbdexport.NewServer(nbdexport.ServerOptions{
		MaxConnections: f.maxConnections(),
		ConnectionEnded: func(negotiated bool, left int) {
			if negotiated && left == 0 && !f.persistent {
				stop()
			}
		},
	})
	backend := imagebackend.New(disk, imagebackend.Options{
		IgnoreDiscard: !f.passDiscard(),
		Direct:        mode == imagefile.CacheNone || mode == imagefile.CacheDirectsync,
	})
	export := &nbdexport.Export{Name: f.name, Description: f.description, Backend: backend, ReadOnly: f.readOnly}
	if err := server.AddExport(export); err != nil {
		return err
	}
	listener, err := f.listen.listen(ctx)
	if err != nil {
		return err
	}
	if f.pidFile != "" {
		if err := writePIDFile(f.pidFile); err != nil {
			listener.Close()
			return err
		}
		defer os.Remove(f.pidFile) // a leftover is harmless
	}
	if err := server.Serve(ctx, listener); !errors.Is(err, nbdexport.ErrServerClosed) {
		return err
	}
	return nil
}

// maxConnections translates -e for a server.
func (f *nbdFlags) maxConnections() int {
	if f.shared == 0 {
		return -1
	}
	return f.shared
}

// writePIDFile writes our process ID to path, as a line.
func writePIDFile(path string) error {
	if err := os.WriteFile(path, fmt.Appendln(nil, os.Getpid()), 0o644); err != nil {
		return fmt.Errorf("nbd: pid file: %w", err)
	}
	return nil
}
