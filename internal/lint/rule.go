package lint

import "slices"

// A rule is something that holds everywhere in the tree.
type rule struct {
	name     string // of its test
	sentence string // the rule, as said to whoever broke it
	// check calls found for each place that breaks the rule; what says which
	// import, call or word it is.
	check func(t *tree, found func(at, what string))
}

// rules are the house rules, in the order of their files.
var rules = []rule{
	importsDown,
	importsOutside,
	testHelpers,
	exitInCmd,
	noContextTODO,
	noErrorText,
	noSilentSkip,
	packageDoc,
	offsetShifts,
	fileLength,
	todoHasIssue,
	noHosts,
	noMachinePaths,
}

// findings runs r over t and returns sorted "place: what: sentence" lines.
func (r rule) findings(t *tree) []string {
	var lines []string
	r.check(t, func(at, what string) { lines = append(lines, at+": "+what+": "+r.sentence) })
	slices.Sort(lines)
	return lines
}
