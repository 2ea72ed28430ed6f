package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"csi-qcow2/internal/imagefile"
	"csi-qcow2/qcow2"
)

// imgProgram is what messages begin with, where qemu-img says qemu-img.
const imgProgram = "csi-qcow2 img"

// An imgCommand is a subcommand of img; args begin with its name.
type imgCommand struct {
	name  string
	usage string
	run   func(c *imgContext, args []string) error
}

// imgCommands returns the subcommands, with the options of qemu-img 7.2.
func imgCommands() []imgCommand {
	return []imgCommand{
		{"check", "[-q] [-f FMT] [--output=FORMAT] [-r leaks|all] [-T CACHE] [-U] FILE", imgCheck},
		{"compare", "[-f FMT] [-F FMT] [-T CACHE] [-p] [-q] [-s] [-U] FILE1 FILE2", imgCompare},
		{"convert", "[--target-is-zero] [-U] [-C] [-c] [-p] [-q] [-n] [-f FMT] [-t CACHE] [-T CACHE] [-O FMT] [-B FILE [-F FMT]] [-o OPTIONS] [-l SNAPSHOT] [-S SIZE] [-m N] [-W] FILE… TARGET", imgConvert},
		{"create", "[-q] [-f FMT] [-b FILE [-F FMT]] [-u] [-o OPTIONS] FILE [SIZE]", imgCreate},
		{"info", "[-f FMT] [--output=FORMAT] [--backing-chain] [-U] FILE", imgInfo},
		{"map", "[-f FMT] [-s OFFSET] [-l LENGTH] [--output=FORMAT] [-U] FILE", imgMap},
		{"measure", "[--output=FORMAT] [-O FMT] [-o OPTIONS] [--size N | [-f FMT] [-l SNAPSHOT] FILE]", imgMeasure},
		{"rebase", "[-U] [-q] [-f FMT] [-t CACHE] -u -b FILE [-F FMT] FILE", imgRebase},
		{"resize", "[-f FMT] [--preallocation=MODE] [-q] [--shrink] FILE [+|-]SIZE", imgResize},
		{"snapshot", "[-U] [-q] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE", imgSnapshot},
	}
}

func newImgCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "img SUBCOMMAND …",
		Short: "Create, convert, check and inspect images, with the command line of qemu-img",
		Long:  imgHelp(),
		// The options are qemu-img's, down to how they are parsed.
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			c := &imgContext{Context: cmd.Context(), stdout: cmd.OutOrStdout(), stderr: cmd.ErrOrStderr()}
			return c.finish(c.dispatch(args))
		},
	}
}

// imgHelp returns the help text.
func imgHelp() string {
	var b strings.Builder
	b.WriteString("The command line, output and exit codes of qemu-img 7.2, for images in qcow2 and raw format.\n\nSubcommands:\n")
	for _, cmd := range imgCommands() {
		fmt.Fprintf(&b, "  %s %s\n", cmd.name, cmd.usage)
	}
	b.WriteString(`
  FMT       qcow2 or raw; without it the format of an existing image is probed
  SIZE      bytes, or with suffix k, M, G, T, P or E
  OPTIONS   NAME=VALUE,…; "-o help" lists them
  CACHE     none, writeback, writethrough, directsync or unsafe
  SNAPSHOT  ID or name; for -l also snapshot.id=ID,snapshot.name=NAME
  FORMAT    human or json
  -U        tolerate that others write the image
  -p, -q    show progress, be quiet
`)
	return b.String()
}

// An imgContext is one run of img.
type imgContext struct {
	context.Context
	stdout, stderr io.Writer
}

// dispatch runs the subcommand of args.
func (c *imgContext) dispatch(args []string) error {
	if len(args) == 0 {
		return imgUsagef("Not enough arguments")
	}
	switch name := args[0]; name {
	case "-h", "--help":
		_, err := io.WriteString(c.stdout, imgHelp())
		return err
	case "-V", "--version":
		_, err := fmt.Fprintf(c.stdout, "%s version %s\n", imgProgram, version)
		return err
	default:
		if strings.HasPrefix(name, "-") {
			return imgUsagef("unrecognized option '%s'", name)
		}
		for _, cmd := range imgCommands() {
			if cmd.name == name {
				return cmd.run(c, args)
			}
		}
		return imgUsagef("Command not found: %s", name)
	}
}

// An imgError ends img with a message, in qemu-img's words, and an exit code.
type imgError struct {
	code int    // 0 means 1
	text string // "" if all is said
	hint bool   // point to the help
}

func (e *imgError) Error() string { return e.text }

// imgErrorf returns an error that ends img with exit code 1.
func imgErrorf(format string, args ...any) error {
	return &imgError{text: fmt.Sprintf(format, args...)}
}

// imgUsagef returns an error that ends img with exit code 1 and points to the help.
func imgUsagef(format string, args ...any) error {
	return &imgError{text: fmt.Sprintf(format, args...), hint: true}
}

// imgExit returns an error that ends img with the exit code code and no message.
func imgExit(code int) error { return &imgError{code: code} }

// finish prints err and turns it into one that carries the exit code.
func (c *imgContext) finish(err error) error {
	if err == nil {
		return nil
	}
	e := &imgError{text: err.Error()}
	errors.As(err, &e)
	if e.text != "" {
		c.errorf("%s", e.text)
	}
	if e.hint {
		fmt.Fprintf(c.stderr, "Try '%s --help' for more information\n", imgProgram)
	}
	return &codedError{code: max(e.code, exitError)}
}

// errorf prints a message to stderr.
func (c *imgContext) errorf(format string, args ...any) {
	fmt.Fprintf(c.stderr, imgProgram+": "+format+"\n", args...)
}

// printf prints to stdout. A stdout that is gone is noticed where it matters:
// the exit code of img is that of its work.
func (c *imgContext) printf(format string, args ...any) {
	fmt.Fprintf(c.stdout, format, args...)
}

// open opens an image for a subcommand and reports a fault as qemu-img does.
func (c *imgContext) open(name string, o imagefile.Options) (qcow2.Disk, imagefile.Info, error) {
	disk, info, err := imagefile.Open(c, name, o)
	if err != nil {
		return nil, info, imgErrorf("Could not open '%s': %s", name, imgText(err))
	}
	if info.Probed && info.Format == "raw" && !o.ReadOnly {
		fmt.Fprintf(c.stderr, `WARNING: Image format was not specified for '%s' and probing guessed raw.
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.
         Specify the 'raw' format explicitly to remove the restrictions.
`, name)
	}
	return disk, info, nil
}

// closeImage closes d; a fault that only shows then becomes *err.
func closeImage(d io.Closer, err *error) {
	if cerr := d.Close(); cerr != nil && *err == nil {
		*err = imgErrorf("Could not close the image: %s", imgText(cerr))
	}
}

// cacheMode parses the argument of -t or -T.
func imgCacheMode(s, what string) (imagefile.CacheMode, error) {
	mode, ok := imagefile.ParseCacheMode(s)
	if !ok {
		return "", imgErrorf("Invalid %scache option: %s", what, s)
	}
	return mode, nil
}

// imgOutput parses the argument of --output and reports whether it is json.
func imgOutput(s string) (bool, error) {
	switch s {
	case "json":
		return true, nil
	case "human":
		return false, nil
	}
	return false, imgErrorf("--output must be used with human or json as argument.")
}

// hostBytes returns the bytes that the file takes on its host.
func hostBytes(path string) (int64, error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return statBlocks(st) * 512, nil
}
