package main

import (
	"errors"
	"fmt"
	"os"
	"runtime/metrics"
	"time"
)

// The targets.
const (
	maxStall  = 10 * time.Millisecond // above the longest write without a snapshot
	qemuRatio = 10                    // times faster than qemu-img
)

// report prints r and says whether the targets are met.
func report(o options, r *result) error {
	fmt.Printf("\nwrites of %d bytes by duration, all %d runs\n", writeBytes, o.runs)
	hs := make([]*histogram, turnCount)
	for i := range hs {
		hs[i] = &r.writes[i]
	}
	print(os.Stdout, turnNames[:], hs)
	fmt.Printf("%12s", "writes")
	for _, h := range hs {
		fmt.Printf(" %12d", h.count())
	}
	for _, q := range []float64{0.5, 0.99, 0.999, 0.9999} {
		fmt.Printf("\n%11v%%", q*100)
		for _, h := range hs {
			fmt.Printf(" %12v", h.quantile(q))
		}
	}
	fmt.Printf("\n\nheap in use: %d KiB before, at most %d KiB during an operation\n", r.before>>10, r.heap>>10)
	var missed error
	without := median(r.longest[turnWithout])
	fmt.Printf("longest write, median of %d runs: without %v", o.runs, without.Round(10*time.Microsecond))
	for _, kind := range []int{turnCreate, turnDelete} {
		above := median(r.longest[kind]) - without
		fmt.Printf(", %s %+v", turnNames[kind], above.Round(10*time.Microsecond))
		if above > maxStall {
			missed = errors.Join(missed, fmt.Errorf("a %s makes the longest write %v longer, the target is %v", turnNames[kind], above, maxStall))
		}
	}
	fmt.Println()
	for _, kind := range []int{turnCreate, turnDelete} {
		took := median(r.took[kind])
		fmt.Printf("%s: %v under load", turnNames[kind], took.Round(time.Millisecond))
		if peer := r.qemu[kind]; peer > 0 {
			fmt.Printf(", qemu-img %v alone: %.1f times as long", peer.Round(time.Millisecond), float64(peer)/float64(took))
			if kind == turnCreate && took*qemuRatio > peer {
				missed = errors.Join(missed, fmt.Errorf("a snapshot takes %v, qemu-img %v: the target is a tenth", took, peer))
			}
		}
		fmt.Println()
	}
	return missed
}

// heapInUse returns the bytes of live and not yet collected objects.
func heapInUse() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
