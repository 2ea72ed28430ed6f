package nbdexport

import (
	"net"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pollTime is how long a connection waits awake. A client that sends one
	// request at a time takes 10 to 40 µs from a reply to the next, and to fall
	// asleep and be woken takes as long.
	pollTime = 50 * time.Microsecond
	// pollAfter is how many waits in a row have to be short before one is spent awake,
	// and pollProbe after how many of those one is spent asleep, to see whether
	// requests gather meanwhile.
	pollAfter, pollProbe = 16, 256
	// pollRequests is how many requests may gather for a wait. Where there are more,
	// the client does not wait for each reply, and is served best with many at a time.
	pollRequests = 4
	// awayTime between two looks means that something else had the CPU.
	awayTime = 50 * time.Microsecond
	// pollPause is for how many waits nothing is tried after it was not worth it.
	pollPause = 128
)

// A poller waits awake for the next requests of a client that sends few at a time: it
// looks at the connection again and again. To be woken takes longer than such a
// client takes for its next request: 4 KiB reads one at a time are 1.6 times as many,
// two at a time three times.
//
// It shall cost CPU time that nobody else wants. Between two looks it yields to other
// processes, and it pauses when one of them took the CPU; at most half of the CPUs
// that this process may use are spent so.
type poller struct {
	conn  syscall.RawConn // nil if there is none: then every wait is asleep
	limit int32           // of waits awake at a time, of all connections
	// score counts the waits in a row that were short; below 0, those of a pause.
	score int

	// Of the wait that is spent awake.
	look func(fd uintptr) bool // lookAt
	buf  []byte
	n    int
	err  error
	away bool // something else had the CPU
}

// awake is how many connections wait awake.
var awake atomic.Int32

func newPoller(nc net.Conn) *poller {
	p := &poller{limit: int32(runtime.GOMAXPROCS(0) / 2)}
	if c, ok := nc.(syscall.Conn); ok {
		p.conn, _ = c.SyscallConn() // fails only when closed
	}
	p.look = p.lookAt
	return p
}

// eager reports whether to spend the next wait awake, after one for which requests
// gathered. Too many of them begin a pause.
func (p *poller) eager(requests int) bool {
	if p.score < pollAfter {
		return false
	}
	if requests > pollRequests {
		p.score = -pollPause
	}
	return p.score > 0 && p.score%pollProbe != 0 && p.conn != nil
}

// slept is told that a wait asleep took d, after one for which requests gathered.
func (p *poller) slept(d time.Duration, requests int) {
	if p.score < 0 || requests <= pollRequests && d <= 2*pollTime { // to be woken takes time, too
		p.score++
		return
	}
	p.score = 0
}

// read reads what comes within pollTime into b. If it returns 0 and nil, the next wait is
// one asleep.
func (p *poller) read(b []byte) (int, error) {
	defer awake.Add(-1)
	if awake.Add(1) > p.limit {
		return 0, nil
	}
	p.buf, p.n, p.err, p.away = b, 0, nil, false
	err := p.conn.Read(p.look)
	if err == nil {
		err = p.err
	}
	p.buf = nil
	switch {
	case p.away:
		p.score = -pollPause
	case p.n == 0:
		p.score = 0
	default:
		p.score++
	}
	return p.n, err
}

// lookAt reads from the connection's descriptor until something is there or
// pollTime is over. It returns true: nobody shall wait for it here.
func (p *poller) lookAt(fd uintptr) bool {
	begin := time.Now()
	for {
		n, err := unix.Read(int(fd), p.buf)
		if err != unix.EAGAIN && err != unix.EINTR {
			p.n, p.err = max(n, 0), err
			p.away = false // if something had the CPU, it was the client
			return true
		}
		now := time.Now()
		if p.away || now.Sub(begin) > pollTime {
			return true
		}
		unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // never fails
		p.away = time.Since(now) > awayTime
	}
}
