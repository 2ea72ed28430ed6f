// Command bench compares csi-qcow2 with its peers, and writes what it saw into
// bench/RESULTS.md. `make bench` installs the peers and runs it.
//
//	go run ./bench -list                    names the lines of the table and their groups
//	go run ./bench -run '^read-4k-qd32$'    repeats one line
//	go run ./bench -record                  runs all and writes RESULTS.md
//	go run ./bench -record -run '^tools$'   runs a group and writes RESULTS.md again
//	go run ./bench -record -resume          goes on where that was interrupted
//
// # Method
//
// A line is one kind of work with one figure. It is done in turns: once by us,
// once by each peer, and again, for at least five rounds. A ratio is that of the
// medians, and is above 1 when we are better; beside it stand the smallest and
// the largest ratio of one round. A noisy machine moves both sides of a round.
//
// "best QEMU" is the variant of qemu-nbd and qemu-storage-daemon, or of
// qemu-img's flags, that did best in a first turn that is not counted.
//
// Peers that are missing are an error. Images are on a tmpfs, so that nobody's
// disk is measured, unless a line says disk.
//
// # Files
//
//	results.json   the samples of the last recorded run of each line
//	RESULTS.md     the table made of them
//	*.svg          a chart for each group of lines
//	NOTES.md       what was tried, what it brought, and what bounds the rest
package main
