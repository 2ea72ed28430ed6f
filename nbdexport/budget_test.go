package nbdexport

import (
	"context"
	"io"
	"net"
	"syscall"
	"testing"
)

// striped is a backend of 8 MiB whose every other 64 KiB are a hole. It fails
// beyond 6 MiB.
type striped struct{ err error }

const stripedSize = 8 << 20

func (b striped) do(off int64) error {
	if off >= 6<<20 {
		return b.err
	}
	return nil
}

func (b striped) ReadAt(p []byte, off int64) (int, error)    { return len(p), b.do(off) }
func (b striped) WriteAt(p []byte, off int64) (int, error)   { return len(p), b.do(off) }
func (b striped) WriteZeroes(off, n int64, unmap bool) error { return b.do(off) }
func (b striped) Discard(off, n int64) error                 { return b.do(off) }
func (b striped) Flush() error                               { return nil }
func (b striped) Size() int64                                { return stripedSize }
func (b striped) SparseReads() bool                          { return true }
func (b striped) BlockStatus(_ context.Context, off, n int64) (Extent, error) {
	const stripe = 64 << 10
	hole := off/stripe%2 == 1
	return Extent{Len: min(n, stripe-off%stripe), Hole: hole, Zero: hole}, nil
}

// TestBudgetIsReturned checks, for each kind of request and of its end, that
// what was admitted for it returns, no more and no less: otherwise a long
// connection would come to a stop, or lose its bound.
func TestBudgetIsReturned(t *testing.T) {
	var requests []request
	for _, n := range []uint64{0, 1, 4096, 64 << 10, 300 << 10, 2 << 20, 5 << 20} {
		for _, off := range []uint64{0, 2 << 20, 5<<20 + 512<<10, stripedSize - n, stripedSize} {
			for cmd := cmdRead; cmd <= cmdBlockStatus; cmd++ {
				if cmd != cmdDisconnect {
					requests = append(requests, request{cmd: cmd, off: off, n: n})
				}
			}
			requests = append(requests,
				request{cmd: cmdRead, flags: flagDF, off: off, n: n},
				request{cmd: cmdWrite, flags: flagFUA, off: off, n: n},
				request{cmd: cmdWriteZeroes, flags: flagFastZero, off: off, n: n})
		}
	}
	for _, tt := range []struct {
		name  string
		terms terms
		err   error
	}{
		{"simple", terms{}, syscall.EIO},
		{"structured", terms{structured: true, contexts: 6}, syscall.EIO},
		{"unanswered", terms{}, ErrUnanswered},
	} {
		t.Run(tt.name, func(t *testing.T) {
			terms := tt.terms
			terms.flags = (&Export{}).TransmissionFlags()
			server, client := net.Pipe()
			c := newConn(server, striped{tt.err}, terms, 0)
			done := make(chan error)
			go func() { done <- c.serve(t.Context()) }()
			go io.Copy(io.Discard, client) // ends with the connection
			for _, r := range requests {
				if !terms.structured && r.cmd == cmdRead && r.n > maxBuffer && r.off < 6<<20 && r.off+r.n > 6<<20 {
					continue // fails in its middle, which ends the connection
				}
				b := make([]byte, requestSize)
				r.encode(b)
				if r.cmd == cmdWrite {
					b = append(b, make([]byte, r.n)...)
				}
				if _, err := client.Write(b); err != nil {
					t.Fatal(err)
				}
			}
			disconnect := make([]byte, requestSize)
			(&request{cmd: cmdDisconnect}).encode(disconnect)
			if _, err := client.Write(disconnect); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			if c.out.free != connBudget {
				t.Errorf("budget at the end is %d: want %d", c.out.free, connBudget)
			}
		})
	}
}

// shortHoles is a backend of zeroes that tells them 4 KiB at a time.
type shortHoles struct{ striped }

func (shortHoles) BlockStatus(_ context.Context, off, n int64) (Extent, error) {
	return Extent{Len: min(n, 4096-off%4096), Hole: true, Zero: true}, nil
}

// A writeRecorder is a connection that takes everything, and remembers the longest write.
type writeRecorder struct {
	net.Conn
	longest int
}

func (w *writeRecorder) Write(p []byte) (int, error) {
	w.longest = max(w.longest, len(p))
	return len(p), nil
}

// TestHolesAreAdmitted checks that the answer to a read counts against the
// budget when it is nothing but holes: there may be thousands of them.
func TestHolesAreAdmitted(t *testing.T) {
	const budget = 16 << 10
	w := new(writeRecorder)
	c := &conn{backend: shortHoles{}, terms: terms{structured: true}, sparse: true, out: newSender(w, budget, 0)}
	r := request{cmd: cmdRead, n: stripedSize}
	if err := c.out.admit(requestCost); err != nil {
		t.Fatal(err)
	}
	c.readChunks(t.Context(), &task{r: r, cost: requestCost})
	if err := c.out.wait(); err != nil {
		t.Fatal(err)
	}
	if w.longest > budget {
		t.Errorf("%d bytes of replies were held: want at most the budget of %d", w.longest, budget)
	}
	if c.out.free != budget {
		t.Errorf("budget at the end is %d: want %d", c.out.free, budget)
	}
}
