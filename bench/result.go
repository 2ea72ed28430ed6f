package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A result is what one run of a line gave.
type result struct {
	Line    string
	Group   string
	Title   string
	Unit    unit
	Note    string  `json:",omitempty"`
	Limit   float64 `json:",omitempty"`
	Axis    string  `json:",omitempty"` // of a curve
	Kept    float64 `json:",omitempty"` // of a curve
	Series  []series
	Machine machine
	When    time.Time
}

// A series is the samples of one contestant. The first is ours; of a curve, ours
// and QEMU's take turns, place by place.
type series struct {
	Name    string
	Variant string  `json:",omitempty"` // which of a peer's choices it was
	Target  float64 `json:",omitempty"`
	At      string  `json:",omitempty"` // place on a curve's axis
	Samples []float64
}

// addCurve prepares r for a curve, and returns who takes turns.
func (r *result) addCurve(c *curve) []contestant {
	r.Axis, r.Kept = c.axis, c.kept
	var turn []contestant
	for i, label := range c.labels {
		ours, theirs := c.at(i)
		turn = append(turn, ours, theirs)
		r.Series = append(r.Series, series{Name: ours.name, At: label}, series{Name: theirs.name, At: label})
	}
	return turn
}

// sides returns the series of a curve, ours and theirs.
func (r *result) sides() (ours, theirs []series) {
	for i := 0; i+1 < len(r.Series); i += 2 {
		ours, theirs = append(ours, r.Series[i]), append(theirs, r.Series[i+1])
	}
	return ours, theirs
}

// A verdict is one row of the report's table.
type verdict struct {
	peer, variant  string
	figure, theirs string
	ratio, spread  string
	target, held   string
}

// verdicts returns r's rows.
func (r *result) verdicts() []verdict {
	switch {
	case r.Axis != "":
		return []verdict{r.growthVerdict()}
	case len(r.Series) == 1:
		figure := median(r.Series[0].Samples)
		v := verdict{
			peer: "–", figure: r.Unit.text(figure), theirs: "–", ratio: "–", target: "–",
			spread: r.Unit.text(slices.Min(r.Series[0].Samples)) + " – " + r.Unit.text(slices.Max(r.Series[0].Samples)),
		}
		if r.Limit > 0 {
			v.target, v.held = "< "+r.Unit.text(r.Limit), yesNo(figure < r.Limit)
		}
		return []verdict{v}
	}
	var all []verdict
	ours := r.Series[0]
	for _, s := range r.Series[1:] {
		c := compare(r.Unit, ours.Samples, s.Samples)
		v := verdict{
			peer: s.Name, variant: s.Variant,
			figure: r.Unit.text(median(ours.Samples)), theirs: r.Unit.text(median(s.Samples)),
			ratio: fmt.Sprintf("%.2f", c.ratio), spread: fmt.Sprintf("%.2f – %.2f", c.min, c.max), target: "–",
		}
		if s.Target > 0 {
			v.target, v.held = fmt.Sprintf("≥ %.2f", s.Target), yesNo(c.ratio >= s.Target)
		}
		all = append(all, v)
	}
	return all
}

// growthVerdict judges a curve.
func (r *result) growthVerdict() verdict {
	ours, theirs := r.sides()
	ends := func(s []series) string {
		return r.Unit.text(median(s[0].Samples)) + " → " + r.Unit.text(median(s[len(s)-1].Samples))
	}
	v := verdict{peer: theirs[0].Name, figure: ends(ours), theirs: ends(theirs), spread: "–"}
	last := len(ours) - 1
	kept := r.Unit.ratio(median(ours[last].Samples), median(ours[0].Samples))
	if r.Kept > 0 {
		v.ratio, v.target = fmt.Sprintf("%.2f kept", kept), fmt.Sprintf("≥ %.2f kept", r.Kept)
		v.held = yesNo(kept >= r.Kept)
		return v
	}
	rise, spread := growth(r.Unit, ours)
	theirRise, _ := growth(r.Unit, theirs)
	v.ratio, v.target = "–", "rises no more"
	if rise > 0 && theirRise > 0 {
		v.ratio = fmt.Sprintf("%.2f", theirRise/rise)
	}
	v.held = yesNo(rise <= max(theirRise, spread))
	return v
}

func yesNo(ok bool) string {
	if ok {
		return "yes"
	}
	return "**no**"
}

// text returns a figure with its unit.
func (u unit) text(figure float64) string {
	switch {
	case u == iops && figure >= 1000:
		return fmt.Sprintf("%.1fk %s", figure/1000, u)
	case figure >= 100:
		return fmt.Sprintf("%.0f %s", figure, u)
	case figure >= 10:
		return fmt.Sprintf("%.1f %s", figure, u)
	}
	return fmt.Sprintf("%.3g %s", figure, u)
}

// text returns r for a terminal.
func (r *result) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", r.Line, r.Title)
	for _, v := range r.verdicts() {
		fmt.Fprintf(&b, "  %-20s ours %-14s theirs %-14s ratio %-6s (%s)  target %-8s %s  %s\n",
			v.peer, v.figure, v.theirs, v.ratio, v.spread, v.target, v.held, v.variant)
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// results are the last recorded ones of all lines.
type results struct{ all []result }

const resultsName = "results.json"

// loadResults reads what dir keeps; it may be nothing.
func loadResults(dir string) (*results, error) {
	var rs results
	text, err := os.ReadFile(filepath.Join(dir, resultsName))
	if errors.Is(err, fs.ErrNotExist) {
		return &rs, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &rs.all); err != nil {
		return nil, fmt.Errorf("%s: %w; remove it to begin anew", filepath.Join(dir, resultsName), err)
	}
	return &rs, nil
}

// has reports whether there is a result of the line from machine m.
func (rs *results) has(line string, m machine) bool {
	return slices.ContainsFunc(rs.all, func(r result) bool { return r.Line == line && r.Machine.same(m) })
}

// put keeps r in the place of an older one.
func (rs *results) put(r result) {
	rs.all = slices.DeleteFunc(rs.all, func(old result) bool { return old.Line == r.Line })
	rs.all = append(rs.all, r)
}

// sort brings results into the order of the lines, without those of lines that
// there are no more.
func (rs *results) sort() {
	order := make(map[string]int)
	for i, l := range lines(sizesOfRecord) {
		order[l.name] = i
	}
	rs.all = slices.DeleteFunc(rs.all, func(r result) bool { _, ok := order[r.Line]; return !ok })
	slices.SortFunc(rs.all, func(a, b result) int { return order[a.Line] - order[b.Line] })
}

// write writes everything that is made of the results into dir.
func (rs *results) write(dir string) error {
	rs.sort()
	text, err := json.MarshalIndent(rs.all, "", "\t")
	if err != nil {
		return err
	}
	files := map[string]string{resultsName: string(text) + "\n", "RESULTS.md": rs.report()}
	for _, g := range groups {
		for name, chart := range charts(g.name, rs.in(g.name)) {
			files[name] = chart
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// in returns the results of a group.
func (rs *results) in(group string) []result {
	var some []result
	for _, r := range rs.all {
		if r.Group == group {
			some = append(some, r)
		}
	}
	return some
}
