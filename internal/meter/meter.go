package meter

import (
	"math/bits"
	"sync/atomic"
	"time"
)

// A Kind is a kind of request.
type Kind int

// The kinds of requests.
const (
	Read Kind = iota
	Write
	WriteZeroes
	Discard
	Flush
	Kinds // how many there are
)

// String returns the name of k in metrics.
func (k Kind) String() string {
	return [...]string{"read", "write", "write_zeroes", "discard", "flush"}[k]
}

const (
	shards     = 8
	shardShift = 12 // requests of 4 KiB in a row go to different shards
	firstShift = 15 // the first bucket ends at 1<<15 ns

	// Buckets is the number of buckets of a histogram. The last has no bound.
	Buckets = 18
)

// Bound returns the upper bound of bucket i, which has one: i < Buckets-1.
func Bound(i int) time.Duration { return 1 << (firstShift + i) }

// bucketOf returns the first bucket whose bound is not below took.
func bucketOf(took time.Duration) int {
	if took <= 0 {
		return 0
	}
	return min(bits.Len64(uint64(took-1)>>firstShift), Buckets-1)
}

// A Meter counts requests of one backend.
type Meter struct {
	kinds [Kinds][shards]shard
}

// A shard has cache lines of its own.
type shard struct {
	begun  atomic.Uint64
	nanos  atomic.Uint64
	bytes  atomic.Uint64
	errors atomic.Uint64
	ended  [Buckets]atomic.Uint64
	_      [80]byte
}

// epoch is what times are measured from: one clock is read where time.Now
// reads two.
var epoch = time.Now()

// begin counts the begin of a request, and returns what end needs.
func (m *Meter) begin(k Kind, off int64) (*shard, time.Duration) {
	s := &m.kinds[k][off>>shardShift%shards]
	s.begun.Add(1)
	return s, time.Since(epoch)
}

// end counts the end of a request for n bytes.
func (s *shard) end(begun time.Duration, n int64, err error) {
	took := time.Since(epoch) - begun
	s.ended[bucketOf(took)].Add(1)
	s.nanos.Add(uint64(took))
	s.bytes.Add(uint64(n))
	if err != nil {
		s.errors.Add(1)
	}
}

// Stats are the counts of one kind of request.
type Stats struct {
	Requests uint64          // that have ended
	Begun    uint64          // those under way included
	Errors   uint64          // of Requests
	Bytes    uint64          // asked for, of Requests
	Time     time.Duration   // of all Requests together
	Times    [Buckets]uint64 // how many took how long; see Bound
}

// Stats returns the counts of kind k.
func (m *Meter) Stats(k Kind) Stats {
	var sum Stats
	for i := range m.kinds[k] {
		s := &m.kinds[k][i]
		for b := range s.ended { // before begun: so the difference is never negative
			n := s.ended[b].Load()
			sum.Times[b] += n
			sum.Requests += n
		}
		sum.Errors += s.errors.Load()
		sum.Bytes += s.bytes.Load()
		sum.Time += time.Duration(s.nanos.Load())
		sum.Begun += s.begun.Load()
	}
	return sum
}

// Depth returns how many requests are under way.
func (m *Meter) Depth() uint64 {
	var depth uint64
	for k := range Kinds {
		s := m.Stats(k)
		depth += s.Begun - s.Requests
	}
	return depth
}
