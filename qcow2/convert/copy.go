package convert

import (
	"context"
	"errors"
	"fmt"

	"csi-qcow2/qcow2"
)

// Options say how Copy copies. The zero value copies in order with
// DefaultWorkers and writes zeroes where the source reads as zeroes.
type Options struct {
	// Workers copy chunks at the same time; 0 means DefaultWorkers.
	Workers int
	// AnyOrder lets writes to the target begin in any order. Otherwise they
	// begin in ascending order, so that what the target allocates lies in it.
	AnyOrder bool
	// Compressed writes compressed clusters; the target must have
	// WriteCompressed, as *qcow2.Image has, and be new.
	Compressed bool
	// Granule is the unit in which the target stores data, in bytes: its
	// cluster size. 0 means 4096.
	Granule int64
	// TargetIsZero says that the target reads as zeroes: then zeroes are not written.
	TargetIsZero bool
	// TargetHasBacking says that the target's backing file holds what the
	// source's backing file does: only what the source itself holds is copied,
	// and its zeroes are written.
	TargetHasBacking bool
	// NoZeroDetect copies data without looking for zeroes in it.
	NoZeroDetect bool
	// WriteZeroData writes zeroes as data, so that the target is fully allocated.
	WriteZeroData bool
	// KeepSpace writes zeroes without giving space back: the target was preallocated.
	KeepSpace bool
	// Progress, if not nil, is called now and then, by one goroutine at a time,
	// with the bytes that are done, of the size of the source.
	Progress func(done int64)
}

// DefaultWorkers is the number of chunks that are copied at once.
const DefaultWorkers = 8

// chunkBytes is the largest piece that one worker reads and writes at once.
const chunkBytes = 1 << 20

// compressor is a target that stores single clusters compressed.
type compressor interface {
	WriteCompressed(p []byte, off int64) error
}

// Copy makes [0, src.Size()) of dst read as src does. dst must be as large.
func Copy(ctx context.Context, dst, src qcow2.Disk, o Options) error {
	if dst.Size() < src.Size() {
		return fmt.Errorf("convert: the target has %d bytes, the source %d: %w", dst.Size(), src.Size(), qcow2.ErrOutOfRange)
	}
	c := copier{dst: dst, src: src, opts: o}
	if c.opts.Workers <= 0 {
		c.opts.Workers = DefaultWorkers
	}
	if c.opts.Granule <= 0 {
		c.opts.Granule = 4096
	}
	if o.Compressed {
		var ok bool
		if c.compressed, ok = dst.(compressor); !ok {
			return fmt.Errorf("convert: the target cannot be compressed: %w", errors.ErrUnsupported)
		}
	}
	return c.run(ctx)
}

// A copier is one Copy.
type copier struct {
	dst, src   qcow2.Disk
	compressed compressor // nil unless Options.Compressed
	opts       Options
	turn       turn
	progress   progress
}

// A task is a chunk of a segment; seq counts them in ascending order.
type task struct {
	segment
	seq int64
}

func (c *copier) run(ctx context.Context) error {
	c.progress.report = c.opts.Progress
	c.turn.changed.L = &c.turn.mu
	return parallel(ctx, c.opts.Workers, c.produce, c.do)
}

// produce cuts the source into tasks.
func (c *copier) produce(ctx context.Context, emit func(task) error) error {
	seq := int64(0)
	for s, err := range segments(ctx, c.src, c.src.Size(), c.opts.Granule, c.opts.TargetHasBacking) {
		if err != nil {
			return err
		}
		if s.kind == zero && c.opts.WriteZeroData {
			s.kind = data
		}
		for s.off < s.end {
			t := task{s, seq}
			if s.kind == data {
				t.end = min(s.end, (s.off/c.chunk()+1)*c.chunk())
			}
			if err := emit(t); err != nil {
				return err
			}
			seq++
			s.off = t.end
		}
	}
	return nil
}

// chunk returns the size of a chunk: whole granules.
func (c *copier) chunk() int64 { return max(chunkBytes, c.opts.Granule) }

// do does one task.
func (c *copier) do(ctx context.Context, t task) error {
	var buf []byte
	if t.kind == data {
		buf = qcow2.GetBuffer(int(t.end - t.off))
		defer qcow2.PutBuffer(buf)
		if _, err := c.src.ReadAt(buf, t.off); err != nil {
			return fmt.Errorf("read %d bytes at %#x of the source: %w", len(buf), t.off, err)
		}
	}
	if !c.opts.AnyOrder {
		if err := c.turn.wait(ctx, t.seq); err != nil {
			return err
		}
		c.turn.done() // the next may begin; it need not wait for the end of this one
	}
	var err error
	switch t.kind {
	case data:
		err = c.write(buf, t.off)
	case zero:
		err = c.writeZeroes(t.off, t.end-t.off)
	}
	c.progress.add(t.end - t.off)
	return err
}

// write writes the data of one chunk, less its zeroes.
func (c *copier) write(b []byte, off int64) error {
	for len(b) > 0 {
		n, zero := len(b), false
		if !c.opts.NoZeroDetect && !c.opts.WriteZeroData {
			n, zero = run(b, off, c.opts.Granule)
		}
		var err error
		switch {
		case zero:
			err = c.writeZeroes(off, int64(n))
		case c.compressed != nil:
			err = c.writeCompressed(b[:n], off)
		default:
			_, err = c.dst.WriteAt(b[:n], off)
		}
		if err != nil {
			return fmt.Errorf("write %d bytes at %#x of the target: %w", n, off, err)
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

// writeCompressed writes granule by granule.
func (c *copier) writeCompressed(b []byte, off int64) error {
	for len(b) > 0 {
		n := min(int64(len(b)), c.opts.Granule)
		if err := c.compressed.WriteCompressed(b[:n], off); err != nil {
			return err
		}
		b, off = b[n:], off+n
	}
	return nil
}

// writeZeroes makes a range zero unless it is.
func (c *copier) writeZeroes(off, n int64) error {
	if c.opts.TargetIsZero && !c.opts.TargetHasBacking {
		return nil
	}
	return c.dst.WriteZeroes(off, n, !c.opts.KeepSpace)
}
