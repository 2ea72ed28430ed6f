package qcow2

import (
	"fmt"
	"io"
)

// ReadAt implements Disk. Requests of a writer that run at the same time are
// seen whole, in part or not at all, per 512-byte sector.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if err := im.checkRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	slot := im.epochs.enter()
	defer im.epochs.exit(slot)
	if im.closed.Load() {
		return 0, ErrClosed
	}
	l1 := im.l1.Load()
	for done := 0; done < len(p); {
		n, err := im.readRun(l1, p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// readRun reads the first run of one kind of p at off and returns its length.
func (im *Image) readRun(l1 *l1Table, p []byte, off int64) (int, error) {
	m, err := im.lookup(l1, off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	p = p[:m.n]
	switch m.kind {
	case kindNormal:
		err = readHost(im.f, p, m.host)
	case kindCompressed:
		err = im.readCompressed(m.entry, p, im.geo.inCluster(off))
	case kindUnallocated:
		err = im.readBacking(p, off)
	default:
		clear(p)
	}
	return len(p), err
}

// readHost fills p from the image file; what lies beyond its end is zero.
func readHost(f File, p []byte, off HostOffset) error {
	n, err := f.ReadAt(p, int64(off))
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	return fmt.Errorf("qcow2: read %d bytes at %#x of the image file: %w", len(p), uint64(off), err)
}

// readBacking fills p with what the backing chain shows at off: zeroes without
// a backing file and beyond its end.
func (im *Image) readBacking(p []byte, off int64) error {
	n, b := 0, im.base()
	if b != nil {
		n = int(min(max(b.Size()-off, 0), int64(len(p))))
	}
	if n > 0 {
		if _, err := b.ReadAt(p[:n], off); err != nil {
			return fmt.Errorf("qcow2: backing file: %w", err)
		}
	}
	clear(p[n:])
	return nil
}

// checkRange returns ErrOutOfRange unless [off, off+n) lies inside the virtual size.
func (im *Image) checkRange(off, n int64) error {
	if size := im.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: [%#x, +%d) of %d bytes", ErrOutOfRange, off, n, size)
	}
	return nil
}
