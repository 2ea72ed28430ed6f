package main

import (
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

// guard returns the bounds of each pool.
func (f *guardFlags) guard() volume.Guard {
	return volume.Guard{Overcommit: f.overcommit, WarnAt: f.warn / 100, RefuseAt: f.refuse / 100, StopAt: f.stop / 100, Pause: f.pause}
}
