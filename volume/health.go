package volume

import (
	"fmt"
	"slices"
)

// IDs returns the IDs of the volumes that users see, damaged ones included, in order.
func (p *Pool) IDs() []string {
	ids := p.sortedIDs()
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(ids, func(id string) bool { return p.volumes[id] == nil || !p.volumes[id].live() })
}

// Health returns what is known to be wrong with the volume id, nil for
// nothing: a record that does not decode, an image that could not be opened,
// checked or closed, one that is open and failed, waste that could not be
// removed. It does no I/O. Errors: ErrNotFound.
func (p *Pool) Health(id string) (problem, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e := p.volumes[id]
	if e == nil || !e.live() {
		return nil, fmt.Errorf("%w: volume %q", ErrNotFound, id)
	}
	return p.problemLocked(e), nil
}

func (p *Pool) problemLocked(e *entry) error {
	if e.rec == nil {
		return fmt.Errorf("%w: %w", ErrDamaged, e.damage)
	}
	if err := p.failures[e.id]; err != nil {
		return err
	}
	if im, ok := p.images.peek(e.id); ok {
		return im.Failed()
	}
	return nil
}
