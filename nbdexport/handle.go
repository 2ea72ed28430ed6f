package nbdexport

import (
	"context"
	"syscall"
)

// handle performs a task and replies. The request is valid: see validate.
func (c *conn) handle(ctx context.Context, t *task) {
	r := &t.r
	var err error
	switch r.cmd {
	case cmdRead:
		c.handleRead(ctx, t)
		return
	case cmdBlockStatus:
		c.handleBlockStatus(ctx, t)
		return
	case cmdWrite:
		err = c.writeAt(t.buf.b[:r.n], r)
		t.buf.release()
	case cmdFlush:
		err = c.backend.Flush()
	case cmdTrim:
		err = c.discard(r)
	case cmdWriteZeroes:
		err = c.writeZeroes(r)
	case cmdCache:
		if cacher, ok := c.backend.(Cacher); ok && r.n > 0 {
			err = cacher.Cache(int64(r.off), int64(r.n))
		}
	}
	if err == nil && r.flags&flagFUA != 0 && r.modifies() {
		err = c.backend.Flush()
	}
	c.reply(r, err, t.cost)
}

func (c *conn) discard(r *request) error {
	if r.n == 0 {
		return nil
	}
	return c.backend.Discard(int64(r.off), int64(r.n))
}

func (c *conn) writeZeroes(r *request) error {
	unmap := r.flags&flagNoHole == 0
	switch {
	case r.n == 0:
		return nil
	case r.flags&flagFastZero == 0:
		return c.backend.WriteZeroes(int64(r.off), int64(r.n), unmap)
	}
	if fast, ok := c.backend.(FastZeroer); ok {
		return fast.WriteZeroesFast(int64(r.off), int64(r.n), unmap)
	}
	return syscall.EOPNOTSUPP
}
