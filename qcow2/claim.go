package qcow2

import "sync"

// claims serialise the requests that change the mapping of the same clusters:
// a request claims its run of clusters, looks at the mapping again, changes it,
// and releases. Requests on other clusters pass. Writes to clusters that are
// allocated already take no claim.
//
// A request claims its whole run at once and never a second run, so claims
// cannot deadlock.
type claims struct {
	shards [claimShards]claimShard
	pool   sync.Pool
}

const claimShards = 64

type claimShard struct {
	mu   sync.Mutex
	held []*claim // guarded by mu; as many as requests under way, never scanned beyond the shard
}

// A claim is exclusive use of the keys [first, first+n) of one shard key.
type claim struct {
	shard    *claimShard
	first, n uint64
	released chan struct{} // made by the first waiter; guarded by shard.mu
}

// acquire claims keys [first, first+n). Runs that can overlap must have the same
// shardKey: the engine uses the L2 slice that the clusters lie in.
func (c *claims) acquire(shardKey, first, n uint64) *claim {
	s := &c.shards[shardKey%claimShards]
	mine, _ := c.pool.Get().(*claim)
	if mine == nil {
		mine = new(claim)
	}
	*mine = claim{shard: s, first: first, n: n}
	s.mu.Lock()
	for {
		other := s.overlap(first, n)
		if other == nil {
			break
		}
		if other.released == nil {
			other.released = make(chan struct{})
		}
		wait := other.released
		s.mu.Unlock()
		<-wait
		s.mu.Lock()
	}
	s.held = append(s.held, mine)
	s.mu.Unlock()
	return mine
}

func (s *claimShard) overlap(first, n uint64) *claim {
	for _, o := range s.held {
		if first < o.first+o.n && o.first < first+n {
			return o
		}
	}
	return nil
}

func (c *claims) release(mine *claim) {
	s := mine.shard
	s.mu.Lock()
	for i, o := range s.held {
		if o == mine {
			last := len(s.held) - 1
			s.held[i] = s.held[last]
			s.held[last] = nil
			s.held = s.held[:last]
			break
		}
	}
	wait := mine.released
	s.mu.Unlock()
	if wait != nil {
		close(wait)
	}
	c.pool.Put(mine)
}
