// Package sabotage proves that the tests can fail: it breaks one rule of the
// code at a time and runs the tests that are meant to notice.
//
// A mutant is one edit of one source file, applied with the overlay of the go
// command: the tree is not touched, and the code carries no switches. The edit
// names the exact text that it replaces, which must occur once, so that a mutant
// cannot outlive the code that it breaks. A mutant that compiles and passes the
// tests is a rule that nobody guards.
//
// Run it with: make test-sabotage
package sabotage
