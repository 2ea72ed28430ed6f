// Package lint holds the house rules that a machine can check: the direction
// of imports, who may end the process or log, where offsets are shifted, which
// words stay out of the tree. It refuses to have opinions on style: gofmt, go
// vet and staticcheck have those. Run it with `go test ./internal/lint`.
//
// # Support
//
// A rule is a sentence and a function; a finding prints the sentence, because
// the reader should learn the rule, not its regular expression. Every rule has
// an example that breaks it and one that keeps it in lint_test.go; a rule
// without them fails the test.
//
// Rules about Go code see the main module. Rules about words see every text
// file that git knows or would add.
//
// # Terms
//
// The tree is the set of files under the module's root. The area of a package
// is the first word of its path: cmd, driver, volume, nbdexport, qcow2, cache,
// test, bench; a package under internal is an area of its own.
//
// # Concurrency
//
// A tree is immutable once loaded.
//
// # Failure
//
// A file that does not parse is an error of the loader, not a finding.
//
// # Spec
//
// The rules restate ARCHITECTURE.md ("Packages") and CONTRIBUTING.md.
package lint
