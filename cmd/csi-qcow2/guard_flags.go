package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/pflag"

	"csi-qcow2/volume"
)

// guardFlags are the flags that bound what pools of thin volumes promise and take.
type guardFlags struct {
	overcommit         float64
	warn, refuse, stop float64 // percent
	pause              time.Duration
}

func defaultGuardFlags() guardFlags { return guardFlags{warn: 85, refuse: 95, stop: 98} }

func (f *guardFlags) add(flags *pflag.FlagSet) {
	flags.Float64Var(&f.overcommit, "overcommit", f.overcommit, "how many times the size of a pool its volumes may have together; 0 sets no bound")
	flags.Float64Var(&f.warn, "pool-warn", f.warn, "use of a pool's filesystem, in percent, from which the pool counts as degraded; 0 for never")
	flags.Float64Var(&f.refuse, "pool-refuse", f.refuse, "use, in percent, from which no volume is made or expanded; 0 for never")
	flags.Float64Var(&f.stop, "pool-stop", f.stop, "use, in percent, from which writes to volumes that need new space are stopped, so that the filesystem does not fill up; 0 for never")
	flags.DurationVar(&f.pause, "pool-pause", f.pause, "how long writes that are stopped wait for space before they get ENOSPC, at most 24h; 0 for not at all")
}

// validate returns all problems at once, in the flags' own terms.
func (f *guardFlags) validate() error {
	var errs []error
	for _, share := range []struct {
		flag  string
		value float64
	}{{"pool-warn", f.warn}, {"pool-refuse", f.refuse}, {"pool-stop", f.stop}} {
		if !(share.value >= 0 && share.value <= 100) { // nor NaN
			errs = append(errs, fmt.Errorf("--%s %v: want a percentage, 0 to 100", share.flag, share.value))
		}
	}
	if f.pause > 0 && f.stop == 0 {
		errs = append(errs, fmt.Errorf("--pool-pause %s: want --pool-stop, too, without which no write is stopped", f.pause))
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if err := f.guard().Validate(); err != nil {
		return fmt.Errorf("--overcommit, --pool-pause: %w", err)
	}
	return nil
}

// guard returns the bounds of each pool.
func (f *guardFlags) guard() volume.Guard {
	return volume.Guard{Overcommit: f.overcommit, WarnAt: f.warn / 100, RefuseAt: f.refuse / 100, StopAt: f.stop / 100, Pause: f.pause}
}
