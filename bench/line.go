package main

import "context"

// A line is one kind of work, with one figure for whoever does it.
type line struct {
	name  string // what -run matches
	group string
	title string
	unit  unit
	// setup, if not nil, prepares what all contestants share, before the first
	// of them; what it returns undoes it.
	setup func(ctx context.Context, e *env) (undo func(), err error)
	ours  contestant
	peers []peer
	limit float64 // without peers: our figure must be below, in units
	curve *curve  // instead of ours and peers
	note  string  // how to read the figure
}

// A unit is what a figure counts.
type unit string

const (
	iops       unit = "IOPS"
	mbps       unit = "MB/s"
	seconds    unit = "s"
	cpuSeconds unit = "CPU s"
	millis     unit = "ms"
	kib        unit = "KiB"
)

// more reports whether larger figures are better.
func (u unit) more() bool { return u == iops || u == mbps }

// ratio returns how many times better ours is than theirs.
func (u unit) ratio(ours, theirs float64) float64 {
	if u.more() {
		return ours / theirs
	}
	return theirs / ours
}

// cost returns a figure as time, or memory, for one unit of work.
func (u unit) cost(figure float64) float64 {
	if u.more() {
		return 1 / figure
	}
	return figure
}

// A contestant does a line's work.
type contestant struct {
	name string
	run  func(ctx context.Context, e *env) (figure float64, err error)
}

// A peer is a contestant that we are compared with: the best of its choices.
type peer struct {
	name    string
	choices []contestant
	target  float64 // ratio that must be reached; 0 when it is shown only
}

// A curve is the same work at growing sizes.
type curve struct {
	axis   string // what grows
	labels []string
	at     func(i int) (ours, theirs contestant)
	kept   float64 // what must be left of our figure at the end; 0 means that QEMU's growth is the bound
}
