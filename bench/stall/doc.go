// Command stall measures what a snapshot costs those who write meanwhile. It
// makes an image of 2 TiB with all metadata, the data sparse, exports it over
// NBD in its own process, and writes 4 KiB at random places of it. It takes
// snapshots and deletes them in turns with the same load alone, and prints how
// long writes took: the longest of each turn, and the distribution of all.
//
//	go run ./bench/stall             five runs; the targets at the end
//	chrt -r 1 go run ./bench/stall   on a machine that has other work; the kernel
//	                                 then takes 50 ms of each second that is used up
//
// Then it closes the image and takes the same snapshot with qemu-img. Last it
// prints what the processors did for the snapshots.
//
// # Method
//
// A turn is a time of -turn with the load running, of which -lead passes before
// the operation starts. A run has four turns: without a snapshot, create, with
// the snapshot there, delete. The figure of a turn is its longest write, that of
// a kind of turn the median over the runs. A write counts from its request on
// the socket to its reply. Clients pause between writes, so that the load alone
// leaves the processors time: a snapshot needs them, too, and what is looked for
// is who waits for whom.
//
// The targets are those of the design: the longest write with a create or delete
// is at most 10 ms above the longest without, and the snapshot is complete in a
// tenth of what qemu-img takes. Exit status 1 says that one is missed.
package main
