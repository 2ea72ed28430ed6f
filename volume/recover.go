package volume

import (
	"context"
	"sync"
)

// recoverParallel is how many images are recovered at once.
const recoverParallel = 8

// Recover opens and closes every image that was not closed by its last user: what
// a killed process left of it in the cache reaches the file, and clusters that
// were lost are given back. The owner of the pool calls it once, before it
// serves. A volume that cannot be recovered is reported by Health; it does not
// keep the others from being used.
func (p *Pool) Recover(ctx context.Context) {
	var workers sync.WaitGroup
	slots := make(chan struct{}, recoverParallel)
	for _, id := range p.unclosed() {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		workers.Go(func() {
			defer func() { <-slots }()
			unlock, err := p.locks.lock(ctx, id)
			if err != nil {
				return // an operation on it opens it
			}
			defer unlock()
			if d, err := p.openAny(ctx, id); err == nil {
				_ = d.Close() // noted for Health, as is an error of opening
			}
		})
	}
	workers.Wait()
}

// unclosed returns the volumes whose record says that their image is open.
func (p *Pool) unclosed() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var ids []string
	for id, e := range p.volumes {
		if e.rec != nil && e.rec.Open {
			ids = append(ids, id)
		}
	}
	return ids
}

// Owns reports whether image is the identity, in the cache, of a volume of the pool.
func (p *Pool) Owns(image [16]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id := range p.volumes {
		if imageID(id) == image {
			return true
		}
	}
	return false
}
