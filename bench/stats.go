package main

import (
	"math"
	"slices"
)

// median returns the middle one of samples, of which there is at least one.
func median(samples []float64) float64 {
	s := slices.Sorted(slices.Values(samples))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// A comparison is what one peer's samples say.
type comparison struct {
	ratio    float64 // of the medians; above 1 when we are better
	min, max float64 // ratio of one round
}

// compare compares samples of rounds in turns.
func compare(u unit, ours, theirs []float64) comparison {
	c := comparison{ratio: u.ratio(median(ours), median(theirs)), min: math.Inf(1), max: math.Inf(-1)}
	for i := range min(len(ours), len(theirs)) {
		r := u.ratio(ours[i], theirs[i])
		c.min, c.max = min(c.min, r), max(c.max, r)
	}
	return c
}

// growth returns how much the cost of one unit of work rises from the first to
// the last of series, with the spread of its samples.
func growth(u unit, of []series) (rise, spread float64) {
	costs := func(s series) (lo, mid, hi float64) {
		lo, hi = slices.Min(s.Samples), slices.Max(s.Samples)
		a, b := u.cost(lo), u.cost(hi)
		return min(a, b), u.cost(median(s.Samples)), max(a, b)
	}
	firstLo, first, firstHi := costs(of[0])
	lastLo, last, lastHi := costs(of[len(of)-1])
	return last - first, max(firstHi-firstLo, lastHi-lastLo)
}
