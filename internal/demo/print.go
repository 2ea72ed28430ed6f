package demo

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// width is the column in which a step's time ends.
const width = 78

// A printer writes the steps as they run:
//
//	1  Start the node agent                                                31 ms
//	     process   csi-qcow2 node, process 4242
type printer struct {
	out     io.Writer
	color   bool
	number  int
	title   string
	begin   time.Time
	details []string
}

const (
	bold  = "\x1b[1m"
	dim   = "\x1b[2m"
	green = "\x1b[32m"
	red   = "\x1b[31m"
	plain = "\x1b[0m"
)

func (p *printer) paint(how, text string) string {
	if !p.color {
		return text
	}
	return how + text + plain
}

func (p *printer) line(text string) { fmt.Fprintln(p.out, text) }

// heading starts a group of steps.
func (p *printer) heading(text string) { p.line("\n" + p.paint(bold, text)) }

// begins announces a step before it runs.
func (p *printer) begins(title string) {
	p.number++
	p.title, p.begin, p.details = title, time.Now(), nil
	fmt.Fprintf(p.out, "%3d  %s", p.number, title)
}

// detail notes a fact of the step that runs, to be printed at its end.
func (p *printer) detail(key, format string, args ...any) {
	p.details = append(p.details, fmt.Sprintf("%-10s%s", key, fmt.Sprintf(format, args...)))
}

// ends completes the step's line with its time, or with a failure.
func (p *printer) ends(ok bool) {
	result, how := duration(time.Since(p.begin)), green
	if !ok {
		result, how = "FAILED", red
	}
	gap := max(1, width-5-utf8.RuneCountInString(p.title)-utf8.RuneCountInString(result))
	fmt.Fprintf(p.out, "%s%s\n", strings.Repeat(" ", gap), p.paint(how, result))
	for _, d := range p.details {
		p.line("       " + p.paint(dim, d))
	}
}

// last prints the line that says that all held.
func (p *printer) last(format string, args ...any) {
	p.line("\n" + p.paint(bold+green, fmt.Sprintf(format, args...)))
}

// duration prints d with three digits or so.
func duration(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// size prints a number of bytes with a binary unit.
func size(bytes int64) string {
	const units = "KMGTPE"
	if bytes < 1024 {
		return fmt.Sprintf("%d bytes", bytes)
	}
	value, unit := float64(bytes), -1
	for value >= 1024 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	if value == float64(int64(value)) {
		return fmt.Sprintf("%d %ciB", int64(value), units[unit])
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}
