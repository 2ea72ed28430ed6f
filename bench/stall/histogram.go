package main

import (
	"fmt"
	"io"
	"math/bits"
	"strings"
	"sync/atomic"
	"time"
)

// A histogram counts durations in classes of a quarter of a power of two, from
// a microsecond on. It may be added to from many goroutines at once.
type histogram struct {
	classes [classCount]atomic.Uint64
	longest atomic.Int64 // nanoseconds
}

const classCount = 4 * 32

// classOf returns the class of d: two bits below the highest one.
func classOf(d time.Duration) int {
	us := uint64(d / time.Microsecond)
	if us < 4 {
		return int(us)
	}
	high := bits.Len64(us) - 1
	return min(4*(high-1)+int(us>>(high-2)&3), classCount-1)
}

// below returns the duration that ends class c.
func below(c int) time.Duration {
	c++
	if c < 4 {
		return time.Duration(c) * time.Microsecond
	}
	return time.Duration(uint64(4+c%4)<<(c/4-1)) * time.Microsecond
}

func (h *histogram) add(d time.Duration) {
	h.classes[classOf(d)].Add(1)
	for {
		longest := h.longest.Load()
		if int64(d) <= longest || h.longest.CompareAndSwap(longest, int64(d)) {
			return
		}
	}
}

// merge adds what o holds.
func (h *histogram) merge(o *histogram) {
	for i := range o.classes {
		h.classes[i].Add(o.classes[i].Load())
	}
	h.longest.Store(max(h.longest.Load(), o.longest.Load()))
}

func (h *histogram) max() time.Duration { return time.Duration(h.longest.Load()) }

func (h *histogram) count() (n uint64) {
	for i := range h.classes {
		n += h.classes[i].Load()
	}
	return n
}

// quantile returns a duration that a share q of the writes stayed below.
func (h *histogram) quantile(q float64) time.Duration {
	rest := uint64(q * float64(h.count()))
	for i := range h.classes {
		n := h.classes[i].Load()
		if n > rest {
			return below(i)
		}
		rest -= n
	}
	return h.max()
}

// print writes one line for each class that is not empty, of several histograms
// side by side.
func print(w io.Writer, names []string, hs []*histogram) {
	fmt.Fprintf(w, "%12s", "below")
	for _, n := range names {
		fmt.Fprintf(w, " %12s", n)
	}
	fmt.Fprintln(w)
	for c := range classCount {
		var line strings.Builder
		any := false
		for _, h := range hs {
			n := h.classes[c].Load()
			any = any || n > 0
			fmt.Fprintf(&line, " %12d", n)
		}
		if any {
			fmt.Fprintf(w, "%12v%s\n", below(c), line.String())
		}
	}
	fmt.Fprintf(w, "%12s", "longest")
	for _, h := range hs {
		fmt.Fprintf(w, " %12v", h.max().Round(time.Microsecond))
	}
	fmt.Fprintln(w)
}
