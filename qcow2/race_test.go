//go:build race

package qcow2_test

// raceEnabled says that the race detector is on.
const raceEnabled = true
