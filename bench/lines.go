package main

import "slices"

// lines returns everything that is measured, in the order of the report.
func lines(s sizes) []*line {
	return slices.Concat(requestLines(), streamLines(), toolLines(), deviceLines(), limitLines(s), growthLines(s))
}

// groups are the parts of the report: each has a chart.
var groups = []struct{ name, title string }{
	{"requests", "Small requests over NBD"},
	{"streams", "Large requests over NBD"},
	{"tools", "Tools"},
	{"device", "Through a block device"},
	{"limits", "Limits"},
	{"growth", "How cost grows"},
}
