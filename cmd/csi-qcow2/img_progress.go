package main

import (
	"fmt"
	"io"
)

// An imgProgress prints how far a subcommand is, as qemu-img -p does: at the
// start, at the end, and at each percent between.
type imgProgress struct {
	w     io.Writer // nil when no progress is wanted
	total int64
	last  float64 // percent printed last
}

// newImgProgress starts the display of work of total units.
func newImgProgress(w io.Writer, wanted bool, total int64) *imgProgress {
	if !wanted {
		return &imgProgress{}
	}
	p := &imgProgress{w: w, total: total}
	p.print(0)
	return p
}

// update says that done units are done. Calls must not overlap.
func (p *imgProgress) update(done int64) {
	if p.w == nil {
		return
	}
	percent := 100.0
	if p.total > 0 {
		percent = float64(done) * 100 / float64(p.total)
	}
	if percent >= p.last+1 || percent >= 100 && p.last < 100 {
		p.print(percent)
	}
}

func (p *imgProgress) print(percent float64) {
	p.last = percent
	fmt.Fprintf(p.w, "    (%3.2f/100%%)\r", percent)
}

// end ends the display.
func (p *imgProgress) end() {
	if p.w != nil {
		fmt.Fprint(p.w, "\n")
	}
}
