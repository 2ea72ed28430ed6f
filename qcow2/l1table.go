package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
)

// An l1Table is the L1 table of the state that an image shows, in memory whole.
// Readers look at it without a lock. Changes go to the cache first, whose turn
// to reach the file comes after the L2 tables', and then to memory.
type l1Table struct {
	off     HostOffset
	entries []atomic.Uint64
}

func (t *l1Table) load(i int) l1Entry { return l1Entry(t.entries[i].Load()) }

// readTable reads n entries (8 bytes each, big endian) at off.
func readTable(f File, structure string, off HostOffset, n int) ([]uint64, error) {
	raw := make([]byte, n*entryBytes)
	if m, err := f.ReadAt(raw, int64(off)); m < len(raw) {
		if err == io.EOF {
			return nil, corruptf(structure, off, "%d bytes lie beyond the end of the file", len(raw)-m)
		}
		return nil, fmt.Errorf("qcow2: read %s at %#x: %w", structure, uint64(off), err)
	}
	entries := make([]uint64, n)
	for i := range entries {
		entries[i] = binary.BigEndian.Uint64(raw[i*entryBytes:])
	}
	return entries, nil
}

func newL1Table(off HostOffset, entries []uint64) *l1Table {
	t := &l1Table{off: off, entries: make([]atomic.Uint64, len(entries))}
	for i, e := range entries {
		t.entries[i].Store(e)
	}
	return t
}

// snapshot returns a copy of the entries.
func (t *l1Table) snapshot() []uint64 {
	entries := make([]uint64, len(t.entries))
	for i := range entries {
		entries[i] = t.entries[i].Load()
	}
	return entries
}

// storeL1 changes entry i of the active L1 table. The L2 table that e names is
// in the cache or in the file already.
//
// Preconditions: the caller holds the claim of this L1 entry, or the gate alone.
func (im *Image) storeL1(i int, e l1Entry) error {
	t := im.l1.Load()
	if err := im.storeWord(classL1, t.off, i, uint64(e)); err != nil {
		return err
	}
	t.entries[i].Store(uint64(e))
	return nil
}

// storeWord stores entry i (8 bytes each) of the table at off through the cache.
func (im *Image) storeWord(class tableClass, off HostOffset, i int, v uint64) error {
	sliceOff, index := im.geo.slice(i)
	t, err := im.handle.Get(class, int64(off)+sliceOff)
	if err != nil {
		return err
	}
	t.Store(index, v)
	t.Unpin()
	return nil
}

// createTable puts a new table of the given clusters at off into the cache: its
// first entries are given, the rest is zero. Nothing is read.
func (im *Image) createTable(class tableClass, off HostOffset, clusters int64, entries []uint64) error {
	perSlice := im.geo.sliceBytes / entryBytes
	for at := int64(0); at < clusters*im.geo.clusterSize; at += int64(im.geo.sliceBytes) {
		t, err := im.handle.Create(class, int64(off)+at)
		if err != nil {
			return err
		}
		first := int(at / entryBytes)
		for i := 0; i < perSlice && first+i < len(entries); i++ {
			t.Store(i, entries[first+i])
		}
		t.Unpin()
	}
	return nil
}
