package main

import (
	"fmt"
	"html"
	"iter"
	"maps"
	"math"
	"strings"
)

// Colours of ours and of the peers, in the order of their series.
var colours = []string{"#1668b8", "#d9822b", "#a8782a", "#7a8794", "#9b6bb3"}

const (
	chartWidth = 860
	barHeight  = 16
	labelWidth = 250
)

func mapKeys(m map[string]string) iter.Seq[string] { return maps.Keys(m) }

// charts returns the charts of a group by their file names: one of bars, and
// one for each curve.
func charts(group string, rs []result) map[string]string {
	all := make(map[string]string)
	var flat []result
	for _, r := range rs {
		if r.Axis != "" {
			all[r.Line+".svg"] = plot(r)
		} else {
			flat = append(flat, r)
		}
	}
	if len(flat) > 0 {
		all[group+".svg"] = bars(flat)
	}
	return all
}

// An svg is a drawing in the making.
type svg struct{ strings.Builder }

func (s *svg) text(x, y float64, anchor, style, text string) {
	fmt.Fprintf(s, `<text x="%.1f" y="%.1f" text-anchor="%s" style="%s">%s</text>`+"\n", x, y, anchor, style, html.EscapeString(text))
}

func (s *svg) line(x1, y1, x2, y2 float64, style string) {
	fmt.Fprintf(s, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" style="%s"/>`+"\n", x1, y1, x2, y2, style)
}

// finish returns the whole file.
func (s *svg) finish(height float64) string {
	return fmt.Sprintf(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%.0f" viewBox="0 0 %d %.0f" `+
		`font-family="sans-serif" font-size="12">`+"\n"+`<rect width="100%%" height="100%%" fill="white"/>`+"\n",
		chartWidth, height, chartWidth, height) + s.String() + "</svg>\n"
}

// bars draws the medians of rs, each line to its own scale, with the range of
// the samples as a whisker.
func bars(rs []result) string {
	var s svg
	y := 10.0
	const width = chartWidth - labelWidth - 110
	for _, r := range rs {
		y += 16
		better := "longer is better"
		if !r.Unit.more() {
			better = "shorter is better"
		}
		s.text(10, y, "start", "font-weight:bold", r.Title+", "+string(r.Unit)+" ("+better+")")
		y += 6
		top := r.Limit
		for _, c := range r.Series {
			for _, v := range c.Samples {
				top = max(top, v)
			}
		}
		for i, c := range r.Series {
			mid := median(c.Samples)
			lo, hi := mid, mid
			for _, v := range c.Samples {
				lo, hi = min(lo, v), max(hi, v)
			}
			name := c.Name
			if c.Variant != "" && len(c.Variant) < 34 {
				name = c.Variant
			}
			s.text(labelWidth-6, y+12, "end", "", name)
			fmt.Fprintf(&s, `<rect x="%d" y="%.1f" width="%.1f" height="%d" fill="%s"/>`+"\n", labelWidth, y+1, mid/top*width, barHeight-3, colours[i%len(colours)])
			s.line(labelWidth+lo/top*width, y+7.5, labelWidth+hi/top*width, y+7.5, "stroke:black;stroke-width:1")
			s.text(labelWidth+hi/top*width+6, y+12, "start", "", r.Unit.text(mid))
			y += barHeight
		}
		if r.Limit > 0 {
			x := labelWidth + r.Limit/top*width
			s.line(x, y-barHeight-2, x, y, "stroke:#c0392b;stroke-width:2")
		}
		y += 6
	}
	return s.finish(y + 10)
}

// plot draws a curve: places on the horizontal axis, the medians on a
// logarithmic vertical one.
func plot(r result) string {
	var s svg
	const left, right, top, bottom = 90.0, chartWidth - 170.0, 40.0, 320.0
	ours, theirs := r.sides()
	lo, hi := math.Inf(1), math.Inf(-1)
	for _, c := range r.Series {
		for _, v := range c.Samples {
			lo, hi = min(lo, v), max(hi, v)
		}
	}
	from, to := math.Floor(math.Log10(lo)), math.Ceil(math.Log10(hi))
	if to == from {
		to++
	}
	vertical := func(v float64) float64 { return bottom - (math.Log10(v)-from)/(to-from)*(bottom-top) }
	horizontal := func(i int) float64 { return left + (float64(i)+0.5)/float64(len(ours))*(right-left) }

	s.text(10, 22, "start", "font-weight:bold", r.Title)
	for d := from; d <= to; d++ {
		y := vertical(math.Pow(10, d))
		s.line(left, y, right, y, "stroke:#ccc")
		s.text(left-8, y+4, "end", "", r.Unit.text(math.Pow(10, d)))
	}
	for i, c := range ours {
		s.text(horizontal(i), bottom+18, "middle", "", c.At)
	}
	s.text((left+right)/2, bottom+38, "middle", "", r.Axis)
	for k, side := range [][]series{ours, theirs} {
		var points []string
		for i, c := range side {
			x, y := horizontal(i), vertical(median(c.Samples))
			points = append(points, fmt.Sprintf("%.1f,%.1f", x, y))
			fmt.Fprintf(&s, `<circle cx="%.1f" cy="%.1f" r="4" fill="%s"/>`+"\n", x, y, colours[k])
			s.text(x, y-8, "middle", "font-size:11px", r.Unit.text(median(c.Samples)))
		}
		fmt.Fprintf(&s, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(points, " "), colours[k])
		s.text(right+10, vertical(median(side[len(side)-1].Samples))+4, "start", "fill:"+colours[k], side[0].Name)
	}
	return s.finish(bottom + 50)
}
