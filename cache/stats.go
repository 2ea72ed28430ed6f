package cache

import "sync/atomic"

// Stats are the counters of a handle. Those without a note grow for ever.
type Stats struct {
	Hits        uint64 // Gets and TryGets that found the table
	Misses      uint64 // tables read from the file
	Evictions   uint64 // clean tables that made room
	Displaced   uint64 // dirty tables of a failed handle that made room
	Writes      uint64 // writes; each of one or more adjacent tables
	Syncs       uint64 // Datasyncs
	Passes      uint64 // passes that succeeded
	Tables      int    // tables in the cache now
	DirtyTables int    // dirty tables now
	DirtyBytes  int64  // bytes of them
}

// hitShards spreads the count of hits: goroutines that hit different sets do
// not share its cache line.
const hitShards = 16

type counters struct {
	misses, evictions, displaced, writes, syncs atomic.Uint64
	tables                                      atomic.Int64

	hits [hitShards]struct {
		n atomic.Uint64
		_ [56]byte
	}
}

// hit counts a hit in set n.
func (c *counters) hit(n int) { c.hits[n%hitShards].n.Add(1) }

// Stats returns the counters.
func (h *Handle) Stats() Stats {
	s := Stats{
		Misses:      h.counters.misses.Load(),
		Evictions:   h.counters.evictions.Load(),
		Displaced:   h.counters.displaced.Load(),
		Writes:      h.counters.writes.Load(),
		Syncs:       h.counters.syncs.Load(),
		Passes:      h.Done(),
		Tables:      int(h.counters.tables.Load()),
		DirtyTables: h.DirtyTables(),
		DirtyBytes:  int64(h.DirtyTables()) * int64(h.o.SliceBytes),
	}
	for i := range h.counters.hits {
		s.Hits += h.counters.hits[i].n.Load()
	}
	return s
}
