package lint

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
)

// maxLines is how long a Go file may be. A file is one noun; 100 to 300 lines
// are usual, and a file over 500 is a question at review.
const maxLines = 700

var fileLength = rule{
	name:     "file length",
	sentence: fmt.Sprintf("a file has one noun and at most %d lines; find the second noun and split", maxLines),
	check: func(t *tree, found func(at, what string)) {
		t.goFiles(func(f *file) {
			if lines := bytes.Count(f.text, []byte("\n")); lines > maxLines && !f.test() {
				found(f.path, fmt.Sprintf("%d lines", lines))
			}
		})
	},
}

var packageDoc = rule{
	name:     "package doc",
	sentence: "every package says in a comment what it is for: \"Package NAME …\" or \"Command NAME …\"",
	check: func(t *tree, found func(at, what string)) {
		for dir, files := range t.packages() {
			documented := false
			for _, f := range files {
				doc := f.ast.Doc.Text()
				name := strings.TrimSuffix(f.ast.Name.Name, "_test")
				if strings.HasPrefix(doc, "Package "+name+" ") || f.ast.Name.Name == "main" && strings.HasPrefix(doc, "Command ") {
					documented = true
				}
			}
			if !documented {
				found(dir, "package without a comment")
			}
		}
	},
}

var todoHasIssue = rule{
	name:     "todo has issue",
	sentence: "work that is left has an issue: write TODO(#12), or do it",
	check:    words(`\b(TODO|FIXME|XXX|HACK)\b`, `\bTODO\(#\d+\)`),
}

var noHosts = rule{
	name:     "no hosts",
	sentence: "no registry's host name stands in the tree; clients know their registries, and an operator sets the images' names",
	check: words(`\b(`+strings.Join([]string{
		`registry[.]k8s[.]io`, `(k8s[.])?gcr[.]io`, `ghcr[.]io`, `quay[.]io`, `docker[.]io`, `(hub|index)[.]docker[.]com`,
		`proxy[.]golang[.]org`, `sum[.]golang[.]org`, `goproxy[.][a-z]+`, `(deb|security|snapshot)[.]debian[.]org`,
		`registry[.]npmjs[.]org`, `pypi[.]org`, `crates[.]io`,
	}, "|")+`)\b`, ""),
}

var noMachinePaths = rule{
	name:     "no machine paths",
	sentence: "no path of somebody's machine stands in the tree; take a directory from the caller, or a temporary one",
	check:    words(`(^|[\s"'=(:])/(work|home/\w+|root|Users/\w+)(/|\b)`, ""),
}

// words returns a check that finds bad in the lines of every file, after what
// matches good, if not "", has been taken out.
func words(bad, good string) func(t *tree, found func(at, what string)) {
	badWord := regexp.MustCompile(bad)
	goodWord := regexp.MustCompile(good)
	return func(t *tree, found func(at, what string)) {
		for _, f := range t.files {
			if strings.HasPrefix(f.path, "internal/lint/") || f.path == "LICENSE" {
				continue // the rules and their examples; somebody else's text
			}
			for i, line := range strings.Split(string(f.text), "\n") {
				if good != "" {
					line = goodWord.ReplaceAllString(line, "")
				}
				if word := badWord.FindString(line); word != "" {
					found(fmt.Sprintf("%s:%d", f.path, i+1), fmt.Sprintf("%q", strings.TrimSpace(word)))
				}
			}
		}
	}
}
