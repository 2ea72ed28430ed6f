package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// The repair writes in this order, each step durable before the next:
//
//  1. the dirty bit (version 3), if corruptions are repaired: who opens the
//     image after a crash repairs it again;
//  2. entries that point nowhere become zero entries;
//  3. refcounts: in place, or, where the structure itself is damaged, a new
//     refcount table with new blocks, and then the 12 bytes of the header that
//     switch to it;
//  4. the snapshot table, if entries of it are incomplete: a new one, the 12
//     bytes of the header that switch to it, and the refcounts of the old one;
//  5. COPIED flags, which must agree with the refcounts on disk;
//  6. the dirty and the corrupt bit are cleared, if nothing is wrong any more.
//
// Leaks are lowered after the references are known to be absent from the
// file; nothing else runs meanwhile, so one pass can do both directions. Each
// step can be repeated.

// errNeedRebuild: a repair of leaks alone must not trust refcounts that are too low.
var errNeedRebuild = errors.New("qcow2: ERROR need to rebuild refcount structures: repair all, not only leaks")

// repair repairs what load, countAll and compare have found.
func (c *checker) repair() error {
	if c.rebuild && !c.o.RepairAll {
		c.report(Problem{}, "ERROR need to rebuild refcount structures")
		return errNeedRebuild
	}
	wrong := !c.res.Clean() || c.copiedWrong || c.broken || len(c.zeroed) > 0
	if !wrong {
		return nil
	}
	if c.o.RepairAll {
		if err := c.setDirty(); err != nil {
			return err
		}
	}
	if err := c.writeZeroed(); err != nil {
		return err
	}
	if err := c.repairRefcounts(); err != nil {
		return err
	}
	if err := c.repairSnapshotTable(); err != nil {
		return err
	}
	if err := c.checkCopied(); err != nil {
		return err
	}
	return c.f.Datasync()
}

// setDirty makes the dirty bit durable, if the image can have one.
func (c *checker) setDirty() error {
	if c.h.version < 3 || c.h.dirty() {
		return nil
	}
	c.dirtied = true
	return c.writeIncompatible(c.h.incompatible | incompatDirty)
}

// finishRepair clears the dirty and the corrupt bit if nothing is wrong any
// more, else it leaves them as they were.
func (c *checker) finishRepair() error {
	bits := c.h.incompatible
	switch {
	case c.res.Corruptions == 0 && c.res.CheckErrors == 0:
		bits &^= incompatDirty | incompatCorrupt
	case c.dirtied:
		bits &^= incompatDirty
	}
	if c.h.version < 3 || bits == c.h.incompatible {
		return nil
	}
	return c.writeIncompatible(bits)
}

// writeIncompatible changes the incompatible feature bits durably.
func (c *checker) writeIncompatible(bits uint64) error {
	if err := writeEntries(c.f, hdrOffIncompatible, []uint64{bits}); err != nil {
		return err
	}
	if err := c.f.Datasync(); err != nil {
		return err
	}
	c.h.incompatible = bits
	return nil
}

// writeZeroed makes zero entries of the entries that countUnaligned has chosen.
func (c *checker) writeZeroed() error {
	if len(c.zeroed) == 0 {
		return nil
	}
	for _, off := range slices.Sorted(maps.Keys(c.zeroed)) {
		table := off &^ HostOffset(c.g.clusterSize-1)
		if !c.onlyTable(table) {
			c.res.CorruptionsFixed--
			c.problem(false, off, "ERROR: Overlap check failed")
			continue
		}
		if err := writeEntries(c.f, off, []uint64{entryZero}); err != nil {
			return err
		}
	}
	return c.f.Datasync()
}

// repairRefcounts makes the stored refcounts equal to the references.
func (c *checker) repairRefcounts() error {
	if c.o.RepairAll && !c.broken {
		missing, err := c.missesBlock()
		if err != nil {
			return err
		}
		c.broken = missing
	}
	if c.broken && c.o.RepairAll {
		return c.rebuildRefcounts()
	}
	return c.editRefcounts()
}

// missesBlock reports whether a referenced cluster has no refcount block.
func (c *checker) missesBlock() (bool, error) {
	errMissing := errors.New("")
	err := c.counts.each(0, c.fileClusters, func(k hostCluster, v counter) error {
		table, _ := c.g.refblockIndex(k)
		if c.counts.count(k, v) > 0 && (table >= len(c.reftable) || refblockOffset(c.reftable[table]) == 0) {
			return errMissing
		}
		return nil
	})
	if err == errMissing {
		return true, nil
	}
	return false, err
}

// editRefcounts corrects refcounts in their blocks.
func (c *checker) editRefcounts() error {
	edit := refblockEdit{c: c, table: -1}
	err := c.eachMismatch(func(k hostCluster, stored, refs uint64) error {
		leak := stored > refs
		if !leak && !c.o.RepairAll {
			return nil
		}
		if err := edit.set(k, refs); err != nil {
			return err
		}
		if leak {
			c.res.Leaks--
		} else {
			c.res.Corruptions--
		}
		c.fixed(leak, c.g.hostOffset(k), "Repairing cluster %d refcount=%d reference=%d", uint64(k), stored, refs)
		return nil
	})
	if err == nil {
		err = edit.flush()
	}
	if err != nil || !edit.written {
		return err
	}
	c.blocks = blockCache{}
	return c.f.Datasync()
}

// A refblockEdit changes refcounts in ascending order of clusters, one write
// for each block.
type refblockEdit struct {
	c       *checker
	table   int // index of block in the refcount table; -1: none
	block   []byte
	written bool
}

// set sets the refcount of k, which has a block.
func (e *refblockEdit) set(k hostCluster, n uint64) error {
	g := &e.c.g
	table, index := g.refblockIndex(k)
	if table != e.table {
		if err := e.flush(); err != nil {
			return err
		}
		e.block = make([]byte, g.clusterSize)
		off := refblockOffset(e.c.reftable[table])
		if err := readZeroed(e.c.f, e.block, off); err != nil {
			return fmt.Errorf("qcow2: refcount block at %#x: %w", uint64(off), err)
		}
		e.table = table
	}
	word, shift := g.refcountWord(index)
	b := e.block[word*8:]
	binary.BigEndian.PutUint64(b, g.setRefcount(binary.BigEndian.Uint64(b), shift, n))
	return nil
}

// flush writes the current block.
func (e *refblockEdit) flush() error {
	if e.table < 0 {
		return nil
	}
	e.written = true
	_, err := e.c.f.WriteAt(e.block, int64(refblockOffset(e.c.reftable[e.table])))
	return err
}

// writeEntries writes big endian entries at off.
func writeEntries(f File, off HostOffset, entries []uint64) error {
	b := make([]byte, 0, len(entries)*entryBytes)
	for _, e := range entries {
		b = binary.BigEndian.AppendUint64(b, e)
	}
	_, err := f.WriteAt(b, int64(off))
	return err
}
