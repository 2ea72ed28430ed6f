//go:build !race

package volume

// raceEnabled says that the race detector is on.
const raceEnabled = false
