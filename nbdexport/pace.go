package nbdexport

import "time"

const (
	// slowRequest is the mean duration from which small requests are handed to
	// workers: two goroutine switches cost a few microseconds, a read of the
	// page cache less than ten, and the fastest disks sixty.
	slowRequest = 50 * time.Microsecond
	// slowRequests is how many requests go to workers before it is tried again
	// to answer in line.
	slowRequests = 256
)

// A pace decides whether the goroutine that reads requests answers the small
// ones itself. That saves two goroutine switches each and lets their replies
// leave together, as long as the backend does not block; when it does, only
// workers give the client the parallelism it asked for. Nothing tells in
// advance which it will be, so the pace measures: requests are answered in
// line until a run of them was slow, then a number of them go to workers.
type pace struct {
	start   time.Time // of the run
	inLine  int       // requests answered in line in this run
	skipped int       // requests still to be handed to workers
}

// begin starts a run: requests have just been read from the connection.
func (p *pace) begin() {
	p.start, p.inLine = time.Now(), 0
}

// end ends a run: the next request has to be waited for.
func (p *pace) end() {
	if p.inLine > 0 && time.Since(p.start) > slowRequest*time.Duration(p.inLine) {
		p.skipped = slowRequests
	}
	p.inLine = 0
}

// next reports whether to answer the next small request in line.
func (p *pace) next() bool {
	if p.skipped > 0 {
		p.skipped--
		return false
	}
	p.inLine++
	return true
}
