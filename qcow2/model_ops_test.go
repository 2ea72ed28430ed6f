package qcow2_test

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"csi-qcow2/qcow2"
)

// An op is one step of an operation list. Offsets, lengths and choices are
// taken modulo what there is, so that any part of a list is a list.
type op struct {
	kind   string
	off, n int64
	arg    uint64 // seed of data, or choice of snapshot
}

func (o op) String() string { return fmt.Sprintf("%s %d %d %d", o.kind, o.off, o.n, o.arg) }

// opWeights says how often an operation comes in a list.
var opWeights = []struct {
	kind   string
	weight int
}{
	{"write", 30}, {"read", 12}, {"zero", 6}, {"unmap", 6}, {"discard", 8}, {"flush", 4},
	{"snap", 3}, {"delsnap", 2}, {"apply", 2}, {"readsnap", 3}, {"resize", 2}, {"reopen", 3},
	{"status", 5}, {"check", 2}, {"writezeroes", 3},
}

// randomOps returns n operations for images of clusters of clusterSize bytes.
func randomOps(rng *rand.Rand, n int, clusterSize int64) []op {
	total := 0
	for _, w := range opWeights {
		total += w.weight
	}
	ops := make([]op, n)
	for i := range ops {
		k := rng.IntN(total)
		for _, w := range opWeights {
			if k -= w.weight; k < 0 {
				ops[i].kind = w.kind
				break
			}
		}
		ops[i].off, ops[i].n, ops[i].arg = rng.Int64N(1<<40), 1+rng.Int64N(3*clusterSize), uint64(rng.Uint32())
		switch rng.IntN(4) { // of all alignments, with a taste for clusters and sectors
		case 0:
			ops[i].off &^= clusterSize - 1
			ops[i].n = clusterSize * (1 + rng.Int64N(8))
		case 1:
			ops[i].off &^= 511
			ops[i].n = (ops[i].n + 511) &^ 511
		}
	}
	return ops
}

// parseOps reads a list that was written with op.String, a line each.
func parseOps(path string) (config, []op, error) {
	f, err := os.Open(path)
	if err != nil {
		return config{}, nil, err
	}
	defer f.Close()
	var c config
	var ops []op
	for s := bufio.NewScanner(f); s.Scan(); {
		line := s.Text()
		if text, ok := strings.CutPrefix(line, "config "); ok {
			if _, err := fmt.Sscanf(text, configFormat, c.fields()...); err != nil {
				return c, nil, fmt.Errorf("%q: %w", line, err)
			}
			continue
		}
		var o op
		if _, err := fmt.Sscan(line, &o.kind, &o.off, &o.n, &o.arg); err != nil {
			return c, nil, fmt.Errorf("%q: %w", line, err)
		}
		ops = append(ops, o)
	}
	return c, ops, nil
}

// A config is a geometry and environment of an image under test.
type config struct {
	version      int
	clusterBits  int
	refcountBits int
	lazy         bool
	cacheKiB     int64
	depth        int   // backing files
	size         int64 // virtual size at the start
	maxSize      int64 // after resizes
	pass         bool  // PassDiscard
	seed         uint64
}

const configFormat = "version=%d cluster=%d refcount=%d lazy=%t cache=%d depth=%d size=%d max=%d pass=%t seed=%d"

func (c *config) fields() []any {
	return []any{&c.version, &c.clusterBits, &c.refcountBits, &c.lazy, &c.cacheKiB, &c.depth, &c.size, &c.maxSize, &c.pass, &c.seed}
}

func (c config) String() string {
	return fmt.Sprintf(configFormat, c.version, c.clusterBits, c.refcountBits, c.lazy, c.cacheKiB, c.depth, c.size, c.maxSize, c.pass, c.seed)
}

func (c config) clusterSize() int64 { return 1 << c.clusterBits }

// configOf returns the i-th configuration of the matrix; the seed decides what
// i does not.
func configOf(rng *rand.Rand, i int) config {
	c := config{
		version:      3,
		clusterBits:  9 + i%13,
		refcountBits: 1 << (i / 2 % 7),
		cacheKiB:     []int64{32, 64, 256, 32 << 10}[rng.IntN(4)],
		depth:        i % 4,
		pass:         rng.IntN(2) == 0,
		seed:         rng.Uint64(),
	}
	switch rng.IntN(6) {
	case 0:
		c.version, c.refcountBits = 2, 16
	case 1, 2:
		c.lazy = true
	}
	// Several L2 tables where clusters are small, several clusters where they are large.
	c.size = max(64<<10, min(c.clusterSize()*c.clusterSize()/8*3, 24*c.clusterSize(), 16<<20)) + rng.Int64N(64)*512
	if c.clusterBits == 9 {
		c.size += 1 << 20 // a long L1 table
	}
	c.maxSize = c.size * 2
	return c
}

func (c config) create() qcow2.CreateOptions {
	o := qcow2.CreateOptions{Version: c.version, ClusterSize: c.clusterSize(), RefcountBits: c.refcountBits, LazyRefcounts: c.lazy}
	if c.version == 2 {
		o.RefcountBits = 0
	}
	return o
}

// reduce removes operations as long as run still fails (delta debugging).
func reduce(ops []op, failure string, run func([]op) string) ([]op, string) {
	deadline := time.Now().Add(20 * time.Second)
	for chunk := len(ops) / 2; chunk > 0; {
		removed := false
		for at := 0; at < len(ops) && time.Now().Before(deadline); {
			less := slices.Delete(slices.Clone(ops), at, min(at+chunk, len(ops)))
			if f := run(less); f != "" {
				ops, failure, removed = less, f, true
			} else {
				at += chunk
			}
		}
		if !removed || chunk > 1 {
			chunk /= 2
		}
		if time.Now().After(deadline) {
			break
		}
	}
	return ops, failure
}

// reportOps fails t and writes the reduced list to a file for -ops.
func reportOps(t *testing.T, c config, ops []op, failure string) {
	t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "config %v\n", c)
	for _, o := range ops {
		fmt.Fprintln(&text, o)
	}
	f, err := os.CreateTemp("", "ops-*.txt")
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteString(text.String())
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	t.Errorf("%s\nreduced to %d operations, replay with: go test ./qcow2 -run TestModelReplay -ops %s\n%s", failure, len(ops), f.Name(), text.String())
}
