package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

const (
	checkReadBytes = 1 << 20 // of one read, if neighbouring tables allow
	checkReadAhead = 4       // reads in advance
)

// readZeroed fills p from off; what lies beyond the end of the file reads as zeroes.
func readZeroed(f File, p []byte, off HostOffset) error {
	n, err := f.ReadAt(p, int64(off))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// entriesInFile returns how many of n entries at off the file has; the others
// read as zeroes. A table costs no more than what is there of it.
func entriesInFile(fileBytes int64, off HostOffset, n int64) int64 {
	return min(n, max(0, fileBytes-int64(off)+entryBytes-1)/entryBytes)
}

// readEntries returns the big endian entries at off, n or as many as the file has.
func (c *checker) readEntries(off HostOffset, n int64) ([]uint64, error) {
	n = entriesInFile(c.fileBytes, off, n)
	b := make([]byte, n*entryBytes)
	if err := readZeroed(c.f, b, off); err != nil {
		return nil, fmt.Errorf("qcow2: table at %#x: %w", uint64(off), err)
	}
	entries := make([]uint64, n)
	for i := range entries {
		entries[i] = binary.BigEndian.Uint64(b[i*entryBytes:])
	}
	return entries, nil
}

// A tableRun is the result of one read: count tables from index first.
type tableRun struct {
	first, count int
	b            []byte
	err          error
}

// readTables calls fn with each table of one cluster at offs, in that order.
// It reads neighbours at once, and ahead of fn.
func (c *checker) readTables(what string, offs []HostOffset, fn func(i int, b []byte) error) error {
	ctx, cancel := context.WithCancel(c.ctx)
	runs := make(chan tableRun, checkReadAhead)
	free := make(chan []byte, checkReadAhead+2)
	done := make(chan struct{})
	go func() { // ends when all is read or ctx is done; waited for below
		defer close(done)
		defer close(runs)
		for i := 0; i < len(offs); {
			r := c.readRun(offs, i, free)
			select {
			case runs <- r:
			case <-ctx.Done():
				return
			}
			if r.err != nil {
				return
			}
			i += r.count
		}
	}()
	defer func() { cancel(); <-done }()
	for r := range runs {
		if r.err != nil {
			return fmt.Errorf("qcow2: %s at %#x: %w", what, uint64(offs[r.first]), r.err)
		}
		size := int(c.g.clusterSize)
		for k := range r.count {
			if err := fn(r.first+k, r.b[k*size:][:size]); err != nil {
				return err
			}
		}
		select {
		case free <- r.b:
		default:
		}
	}
	return c.ctx.Err()
}

// readRun reads the tables from offs[i] on that follow one another in the file.
func (c *checker) readRun(offs []HostOffset, i int, free <-chan []byte) tableRun {
	size := HostOffset(c.g.clusterSize)
	most := max(1, int(checkReadBytes/c.g.clusterSize))
	n := 1
	for n < most && i+n < len(offs) && offs[i+n] == offs[i]+HostOffset(n)*size {
		n++
	}
	var b []byte
	select {
	case b = <-free:
	default:
		b = make([]byte, most*int(size))
	}
	b = b[:n*int(size)]
	return tableRun{first: i, count: n, b: b, err: readZeroed(c.f, b, offs[i])}
}

// blockCache holds refcount blocks that stored has read.
type blockCache struct {
	index int // of block
	block []byte
	more  map[int][]byte
}

const blockCacheBytes = 16 << 20

// stored returns the refcount that the image records for k. It reports false
// if the refcount table is broken there.
func (c *checker) stored(k hostCluster) (n uint64, ok bool, err error) {
	table, index := c.g.refblockIndex(k)
	if table >= len(c.reftable) {
		return 0, true, nil
	}
	off := refblockOffset(c.reftable[table])
	switch {
	case off == 0:
		return 0, true, nil
	case !c.readableBlock(off):
		return 0, false, nil
	}
	if c.blocks.block == nil || c.blocks.index != table {
		if err := c.loadBlock(table, off); err != nil {
			return 0, false, err
		}
	}
	word, shift := c.g.refcountWord(index)
	return c.g.getRefcount(binary.BigEndian.Uint64(c.blocks.block[word*8:]), shift), true, nil
}

// loadBlock makes refcount block table, at off, the current one of the cache.
func (c *checker) loadBlock(table int, off HostOffset) error {
	bc := &c.blocks
	b, ok := bc.more[table]
	if !ok {
		if bc.more == nil || int64(len(bc.more)) >= max(1, blockCacheBytes/c.g.clusterSize) {
			bc.more = map[int][]byte{}
		}
		b = make([]byte, c.g.clusterSize)
		if err := readZeroed(c.f, b, off); err != nil {
			return fmt.Errorf("qcow2: refcount block at %#x: %w", uint64(off), err)
		}
		bc.more[table] = b
	}
	bc.index, bc.block = table, b
	return nil
}

// refblockOffset returns the host offset in a refcount table entry: all its
// bits but the reserved ones.
func refblockOffset(entry uint64) HostOffset { return HostOffset(entry &^ refReservedMask) }
