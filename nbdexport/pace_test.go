package nbdexport

import (
	"testing"
	"testing/synctest"
	"time"
)

// ask lets p decide about n small requests that take d each, as one run, and
// returns how many of them are answered in line.
func ask(p *pace, n int, d time.Duration) (inLine int) {
	p.begin()
	for range n {
		if p.next() {
			time.Sleep(d) // in the bubble of the test
			inLine++
			p.answered()
		}
	}
	p.end()
	return inLine
}

func TestPaceOfAFastBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		for range 100 {
			if got := ask(&p, 32, 10*time.Microsecond); got != 32 {
				t.Fatalf("%d of 32 requests in line: want all", got)
			}
		}
	})
}

// TestPaceOfASlowBackend checks that a slow backend gets workers after one run,
// and is tried ever more rarely.
func TestPaceOfASlowBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		const run = 32
		if got := ask(&p, run, 100*time.Microsecond); got != run {
			t.Fatalf("first run: %d in line: want %d", got, run)
		}
		inLine := 0
		for range 100_000 / run {
			inLine += ask(&p, run, 100*time.Microsecond)
		}
		if inLine < 3 || inLine > 15 {
			t.Errorf("%d of 100000 requests in line: want few, but some", inLine)
		}
		for p.left > 0 {
			p.next()
		}
		if got := ask(&p, run, time.Microsecond); got != run {
			t.Errorf("after it has become fast: %d in line: want %d", got, run)
		}
	})
}

// TestPaceForgivesOneSlowRun checks that a single pause, as when the CPU is
// taken away, costs nothing.
func TestPaceForgivesOneSlowRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p pace
		ask(&p, 1, 20*time.Millisecond)
		for range 10 {
			if got := ask(&p, 32, time.Microsecond); got != 32 {
				t.Fatalf("%d of 32 requests in line: want all", got)
			}
		}
	})
}

// TestPaceOfLongWrites checks that one slow write is forgiven, that two in a row
// send the next to workers, and that the pace finds its way back.
func TestPaceOfLongWrites(t *testing.T) {
	const slow = time.Millisecond
	var p pace
	write := func(d time.Duration) (inLine bool) {
		if inLine = p.next(); inLine {
			p.took(d, slow)
		}
		return inLine
	}
	for i, d := range []time.Duration{slow, 2 * slow, slow, 2 * slow, 2 * slow} {
		if !write(d) {
			t.Fatalf("write %d went to a worker", i)
		}
	}
	for i := range minHanded {
		if write(slow) {
			t.Fatalf("write %d after two slow ones is in line: want it at a worker", i)
		}
	}
	for range 2 {
		if !write(slow) {
			t.Error("a backend that is fast again still has workers")
		}
	}
}
