package nbdexport

import "time"

const (
	// slowRequest is the duration from which small requests are handed to
	// workers: two goroutine switches cost a few microseconds, a read of the
	// page cache less than ten, and the fastest disks sixty.
	slowRequest = 50 * time.Microsecond
	// How many requests go to workers before one is tried in line again: the
	// first number after the backend has become slow, and up to the second
	// while it stays so.
	minHanded, maxHanded = 256, 16384
)

// A pace decides whether the goroutine that reads requests answers the small
// ones itself. That saves two goroutine switches each and lets their replies
// leave together, as long as the backend does not block; when it does, only
// workers give the client the parallelism it asked for. Nothing tells in
// advance which it will be, so the pace measures.
//
//	steady   requests are answered in line and measured by the run: those
//	         that one read of the connection has brought
//	suspect  a run was slow, perhaps because the CPU was taken away: the next
//	         request is measured alone; steady again if it is fast
//	handing  it was slow too: many requests go to workers, then suspect again
type pace struct {
	start   time.Time // of the run, or of the request that is measured alone
	inLine  int       // requests answered in line in this run
	suspect bool
	handed  int // how many requests go to workers this time
	left    int // how many of them are left; more than 0 means handing
}

// begin starts a run: requests have just been read from the connection.
func (p *pace) begin() { p.start, p.inLine = time.Now(), 0 }

// end ends a run: the next request has to be waited for.
func (p *pace) end() {
	if p.inLine > 0 && time.Since(p.start) > slowRequest*time.Duration(p.inLine) {
		p.suspect = true
	}
	p.inLine = 0
}

// next reports whether to answer the next small request in line; then answered
// must follow.
func (p *pace) next() bool {
	if p.left > 0 {
		p.left--
		return false
	}
	if p.suspect {
		p.begin()
	}
	p.inLine++
	return true
}

// answered ends a request that was answered in line.
func (p *pace) answered() {
	if !p.suspect {
		return
	}
	p.suspect = time.Since(p.start) > slowRequest
	if !p.suspect {
		p.handed = 0
		p.begin()
		return
	}
	p.hand()
}

// took is for requests that are each measured by themselves, instead of begin, end and
// answered: one was answered in line, took d, and is slow when that is longer than slow.
func (p *pace) took(d, slow time.Duration) {
	switch {
	case d <= slow:
		p.suspect, p.handed = false, 0
	case p.suspect:
		p.hand()
	default:
		p.suspect = true
	}
}

// hand begins to hand requests to workers.
func (p *pace) hand() {
	p.handed = min(max(2*p.handed, minHanded), maxHanded)
	p.left, p.inLine = p.handed, 0
}
