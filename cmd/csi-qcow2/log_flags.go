package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"github.com/spf13/pflag"
	"k8s.io/klog/v2"
)

// logFlags are the flags of the log, the same for every server.
type logFlags struct {
	verbosity int
	format    string
}

// The formats of the log.
const (
	logText = "text"
	logJSON = "json"
)

func defaultLogFlags() logFlags { return logFlags{verbosity: 2, format: logText} }

func (f *logFlags) add(flags *pflag.FlagSet) {
	flags.IntVar(&f.verbosity, "verbosity", f.verbosity, "log verbosity: 2 state changes, 4 calls")
	flags.StringVar(&f.format, "logging-format", f.format, "text, or json for one object a line")
}

func (f *logFlags) validate() error {
	var errs []error
	if f.verbosity < 0 || f.verbosity > 10 {
		errs = append(errs, fmt.Errorf("--verbosity %d: want 0 to 10", f.verbosity))
	}
	if f.format != logText && f.format != logJSON {
		errs = append(errs, fmt.Errorf("--logging-format %q: want text or json", f.format))
	}
	return errors.Join(errs...)
}

// apply passes the flags to klog, which knows only flags of its own.
func (f *logFlags) apply() {
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	if err := fs.Set("v", strconv.Itoa(f.verbosity)); err != nil {
		panic(err) // a decimal number
	}
	if f.format == logJSON {
		// Levels of logr are negative ones of slog; klog has filtered them already.
		klog.SetSlogLogger(slog.New(slog.NewJSONHandler(os.Stderr, &slog.HandlerOptions{Level: slog.Level(-f.verbosity)})))
	}
}
