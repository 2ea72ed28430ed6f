package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// TestSnapshotRestore: a snapshot of a volume in use holds what was in it at
// its time, whatever is written later, and restores into an equal or larger claim.
func TestSnapshotRestore(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, class, size, larger string
		options                   []claimOption
		file                      string
	}{
		{"ext4", classDefault, "64Mi", "128Mi", nil, mountPath + "/noise"},
		{"xfs", classXFS, "320Mi", "640Mi", nil, mountPath + "/noise"},
		{"block", classDefault, "64Mi", "128Mi", []claimOption{block}, devicePath},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			options := append(c.options, class(c.class))
			s.claim("source", c.size, options...)
			s.start("writer", s.withClaim("source"))
			sum := s.write("writer", c.file, 16)
			taken := s.snapshot("taken", "source")
			if taken.Status.CreationTime == nil || taken.Status.RestoreSize == nil || taken.Status.RestoreSize.IsZero() {
				t.Fatalf("snapshot says %+v, want its time and size", taken.Status)
			}
			later := s.write("writer", c.file, 16)

			s.claim("restored", c.size, append(options, fromSnapshot("taken"))...)
			s.claim("larger", c.larger, append(options, fromSnapshot("taken"))...)
			s.start("reader", s.withClaim("restored"))
			s.start("larger", s.withClaim("larger"))
			s.want("restored content", s.sum("reader", c.file, 16), sum)
			s.want("content restored into a larger volume", s.sum("larger", c.file, 16), sum)
			s.want("content of the source", s.sum("writer", c.file, 16), later)

			bytes := s.filesystemBytes
			if c.file == devicePath {
				bytes = s.deviceBytes
			}
			if have, equal := bytes("larger"), bytes("reader"); have < equal*3/2 {
				t.Fatalf("the larger one has %d bytes, the equal one %d", have, equal)
			}

			// Restored volumes are independent of the source and of each other.
			own := s.write("reader", c.file, 16)
			s.want("content of the source", s.sum("writer", c.file, 16), later)
			s.want("content of the larger one", s.sum("larger", c.file, 16), sum)
			s.want("content of the restored one", s.sum("reader", c.file, 16), own)
		})
	}
}

// TestSnapshotUnderLoad: a snapshot of a volume with a running writer is of one
// moment: of two files that are always written in turn, neither runs ahead.
func TestSnapshotUnderLoad(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.claim("source", "128Mi")
	s.start("writer", s.withClaim("source"), command(
		"cd /data; i=0; while :; do i=$((i+1)); echo $i >>a; sync a; echo $i >>b; sync b; done"))
	eventually(t, "first lines", func(context.Context) error {
		_, err := s.try("writer", "test -s /data/b")
		return err
	})
	var names []string
	for i := range 5 {
		names = append(names, fmt.Sprintf("taken-%d", i))
		s.snapshot(names[i], "source")
	}
	var last int
	for _, name := range names {
		s.claim(name, "128Mi", fromSnapshot(name))
		s.start(name, s.withClaim(name))
		var a, b int
		out := s.sh(name, "wc -l </data/a; wc -l </data/b")
		if _, err := fmt.Sscan(out, &a, &b); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		if a != b && a != b+1 {
			t.Errorf("%s has %d lines in the file written first and %d in the other", name, a, b)
		}
		if a < last {
			t.Errorf("%s has %d lines, an older snapshot %d", name, a, last)
		}
		last = a
		s.stop(name)
	}
}

// TestClone: a clone of a volume in use has its content and is independent.
func TestClone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		options []claimOption
		file    string
	}{
		{"ext4", nil, mountPath + "/noise"},
		{"block", []claimOption{block}, devicePath},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.claim("source", "64Mi", c.options...)
			s.start("writer", s.withClaim("source"))
			sum := s.write("writer", c.file, 16)
			s.claim("clone", "64Mi", append(c.options, fromClaim("source"))...)
			s.start("reader", s.withClaim("clone"))
			s.want("content of the clone", s.sum("reader", c.file, 16), sum)
			later := s.write("writer", c.file, 16)
			s.want("content of the clone", s.sum("reader", c.file, 16), sum)
			own := s.write("reader", c.file, 16)
			s.want("content of the source", s.sum("writer", c.file, 16), later)

			// A clone of a clone, and the middle goes away.
			s.claim("second", "64Mi", append(c.options, fromClaim("clone"))...)
			s.start("third", s.withClaim("second"))
			s.want("content of the second clone", s.sum("third", c.file, 16), own)
			s.stop("reader")
			s.deleteClaim("clone")
			s.want("content of the second clone", s.sum("third", c.file, 16), own)
		})
	}
}

// TestDeletionOrders: a volume, a snapshot of it, a restore of that and a clone
// can go in every order; what stays keeps its content, and nothing is left in the pool.
func TestDeletionOrders(t *testing.T) {
	t.Parallel()
	kinds := []string{"source", "snapshot", "restored", "clone"}
	for order := range permutations(len(kinds)) {
		names := make([]string, len(order))
		for i, k := range order {
			names[i] = kinds[k]
		}
		t.Run(strings.Join(names, ","), func(t *testing.T) {
			t.Parallel()
			s := newSpace(t)
			s.claim("source", "32Mi", block)
			s.start("writer", s.withClaim("source"))
			sum := s.write("writer", devicePath, 2)
			s.stop("writer")
			s.snapshot("snapshot", "source")
			s.claim("restored", "32Mi", block, fromSnapshot("snapshot"), onNode)
			s.claim("clone", "32Mi", block, fromClaim("source"), onNode)
			s.bound("restored")
			s.bound("clone")
			for i, name := range names {
				if name == "snapshot" {
					s.deleteSnapshot(name)
				} else {
					s.deleteClaim(name)
				}
				for _, rest := range names[i+1:] {
					if rest == "snapshot" || i != 1 {
						continue // one look at what is left, in the middle
					}
					s.start("reader", s.withClaim(rest))
					s.want("content of "+rest, s.sum("reader", devicePath, 2), sum)
					s.stop("reader")
				}
			}
		})
	}
}

// permutations yields every order of 0 to n-1.
func permutations(n int) func(yield func([]int) bool) {
	return func(yield func([]int) bool) {
		order := make([]int, n)
		for i := range order {
			order[i] = i
		}
		var from func(k int) bool
		from = func(k int) bool {
			if k == n {
				return yield(append([]int(nil), order...))
			}
			for i := k; i < n; i++ {
				order[k], order[i] = order[i], order[k]
				if !from(k + 1) {
					return false
				}
				order[k], order[i] = order[i], order[k]
			}
			return true
		}
		from(0)
	}
}
