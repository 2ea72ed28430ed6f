package main

import (
	"fmt"
	"slices"
	"strings"
)

// report returns RESULTS.md.
func (rs *results) report() string {
	var b strings.Builder
	b.WriteString("# Results\n\n")
	b.WriteString("Written by `make bench`. A ratio is that of the medians of rounds in turns, and above 1 when\n" +
		"csi-qcow2 is better; the spread is the smallest and the largest ratio of one round. See doc.go\n" +
		"for the method and NOTES.md for what bounds what.\n\n")
	for _, m := range rs.machines() {
		fmt.Fprintf(&b, "- %s\n", m)
	}
	for _, g := range groups {
		some := rs.in(g.name)
		if len(some) == 0 {
			continue
		}
		fmt.Fprintf(&b, "\n## %s\n\n", g.title)
		for _, name := range slices.Sorted(mapKeys(charts(g.name, some))) {
			fmt.Fprintf(&b, "![%s](%s)\n", strings.TrimSuffix(name, ".svg"), name)
		}
		b.WriteString("\n| work | peer | ours | theirs | ratio | spread | target | held |\n|---|---|---|---|---|---|---|---|\n")
		for _, r := range some {
			title := r.Title
			for _, v := range r.verdicts() {
				peer := v.peer
				if v.variant != "" {
					peer += " (" + v.variant + ")"
				}
				fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n", title, peer, v.figure, v.theirs, v.ratio, v.spread, v.target, v.held)
				title = ""
			}
		}
		b.WriteString("\n")
		for _, r := range some {
			if r.Note != "" {
				fmt.Fprintf(&b, "- %s: %s.\n", r.Title, r.Note)
			}
		}
		b.WriteString("\nTo repeat a line:\n\n")
		for _, r := range some {
			fmt.Fprintf(&b, "    go run ./bench -run '^%s$' -pairs %d\n", r.Line, len(r.Series[0].Samples))
		}
	}
	return b.String()
}

// machines describes where the results come from, each machine and revision once.
func (rs *results) machines() []string {
	var all []string
	for _, r := range rs.all {
		text := fmt.Sprintf("%s; revision %s, %s", r.Machine.text(), r.Machine.Revision, r.When.Format("2006-01-02"))
		if !slices.Contains(all, text) {
			all = append(all, text)
		}
	}
	return all
}
