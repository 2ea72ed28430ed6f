package volume

import (
	"context"
	"sync"
)

// recoverParallel is how many images are recovered at once.
const recoverParallel = 8

// Recover opens and closes every image that was not closed by its last user: what
// a killed process left of it in the cache reaches the file, and clusters that
// were lost are given back. Of an image that had failed nothing is kept that was not
// durable: nobody has taken over those whom that was promised. The owner of the pool calls it
// once, after the images that are taken over were opened. A volume that cannot be recovered is reported by Health; it does not
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
			p.forgetFailure(id)
			if d, err := p.openAny(ctx, id); err == nil {
				_ = d.Close() // noted for Health, as is an error of opening
			}
		})
	}
	workers.Wait()
}

// forgetFailure lets the image of the volume id, if a predecessor left it
// failed and it is not open, be verified and used again.
func (p *Pool) forgetFailure(id string) {
	e := p.find(id)
	if e == nil || p.opts.Cache == nil {
		return
	}
	p.mu.Lock()
	rec := e.rec
	p.mu.Unlock()
	if rec == nil {
		return
	}
	image := imageID(id, rec.Generation)
	if _, failed := p.opts.Cache.Left(image); failed {
		_ = p.opts.Cache.Forget(image) // an error says that another drops it
	}
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

// Owns reports whether image may be the identity, in the cache, of a volume of
// the pool: of one whose record is damaged any may be.
func (p *Pool) Owns(image [16]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, e := range p.volumes {
		if e.rec == nil || imageID(id, e.rec.Generation) == image {
			return true
		}
	}
	return false
}
