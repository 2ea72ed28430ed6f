package nbdexport

import (
	"context"
	"fmt"
	"math"
)

// maxStatusLookups bounds the work of one block status request: the calls to
// the backend, whose extents may be short and merge into few.
const maxStatusLookups = 64 << 10

// maxCompactExtent is the longest extent that 32 bits can tell, rounded down
// so that the next one starts at a multiple of a large block.
const maxCompactExtent = math.MaxUint32 &^ (64<<10 - 1)

// handleBlockStatus answers with one chunk for each negotiated context. Each
// may describe less than was asked for, but at least one extent.
func (c *conn) handleBlockStatus(ctx context.Context, t *task) {
	r := &t.r
	limit := maxStatusExtents
	if r.flags&flagReqOne != 0 {
		limit = 1
	}
	extents := make(map[metaContext][]statusExtent, len(metaContexts))
	last, cost := metaContext(0), 0
	for _, m := range metaContexts {
		if !c.terms.hasContext(m.id) {
			continue
		}
		list, err := c.statusExtents(ctx, r, m.id, limit)
		if err != nil {
			c.replyError(r, err, "", t.cost)
			return
		}
		extents[m.id] = list
		last = m.id
		cost += c.terms.statusExtentSize() * len(list)
	}
	if c.out.admit(cost) != nil {
		return
	}
	b, start := c.out.compose()
	for _, m := range metaContexts {
		if list, ok := extents[m.id]; ok {
			flags := uint16(0)
			if m.id == last {
				flags = chunkDone
			}
			b.head = c.terms.appendBlockStatus(b.head, r, flags, m.id, list)
		}
	}
	b.addHead(start)
	c.out.commit(t.cost + cost)
}

// blockStatus asks the backend, and checks the promise without which a loop
// over extents might not end.
func (c *conn) blockStatus(ctx context.Context, off, n uint64) (Extent, error) {
	e, err := c.backend.BlockStatus(ctx, int64(off), int64(n))
	if err == nil && (e.Len < 1 || uint64(e.Len) > n) {
		return Extent{}, fmt.Errorf("nbdexport: backend reports an extent of %d bytes at %#x: want 1 to %d", e.Len, off, n)
	}
	return e, err
}

// statusExtents returns up to limit extents of the context id, from the start
// of r's range, as far as the limits of a reply and of its work reach.
func (c *conn) statusExtents(ctx context.Context, r *request, id metaContext, limit int) ([]statusExtent, error) {
	longest := uint64(math.MaxInt64)
	if !c.terms.extended {
		longest = maxCompactExtent
	}
	var list []statusExtent
	end := r.off + r.n
	for off, lookups := r.off, 0; off < end && lookups < maxStatusLookups; lookups++ {
		e, err := c.blockStatus(ctx, off, min(end-off, longest))
		if err != nil {
			return nil, err
		}
		n, state := uint64(e.Len), e.state(id)
		if k := len(list); k > 0 && list[k-1].state == state && list[k-1].n+n <= longest {
			list[k-1].n += n
		} else if k == limit {
			break
		} else {
			list = append(list, statusExtent{n, state})
		}
		off += n
	}
	return list, nil
}

// state returns what the context id tells about e.
func (e Extent) state(id metaContext) uint32 {
	if id == contextDepth {
		return uint32(e.Depth)
	}
	var state uint32
	if e.Hole {
		state |= stateHole
	}
	if e.Zero {
		state |= stateZero
	}
	return state
}
