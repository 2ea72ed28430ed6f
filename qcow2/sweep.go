package qcow2

import (
	"runtime"
	"sync"
)

// sliceBuffers hold the entries of a slice while a table is swept.
var sliceBuffers = sync.Pool{New: func() any { return new([maxSliceBytes / entryBytes]uint64) }}

// pause is called between two tables by what works through all of an image: it
// lets requests go first, for which it would be in the way otherwise, on the
// processor and in the cache.
func (im *Image) pause() error {
	runtime.Gosched()
	return im.handle.Relieve()
}

// eachSlice calls visit with each slice of the L2 table at off: its place in the
// table, and its entries in a buffer that visit may change until it returns.
func (im *Image) eachSlice(off HostOffset, visit func(slice int64, l2 []uint64) error) error {
	g := &im.geo
	buf := sliceBuffers.Get().(*[maxSliceBytes / entryBytes]uint64)
	defer sliceBuffers.Put(buf)
	words := buf[:g.sliceBytes/entryBytes]
	for slice := int64(0); slice < g.clusterSize; slice += int64(g.sliceBytes) {
		t, err := im.handle.Get(classL2, int64(off)+slice)
		if err != nil {
			return err
		}
		t.Words(words, 0)
		t.Unpin()
		if err := visit(slice, words); err != nil {
			return err
		}
	}
	return nil
}

// eachRun calls use with the host clusters that the entries of an L2 slice refer
// to, in runs.
func (im *Image) eachRun(l2 []uint64, use func(run) error) error {
	var r run
	for i := 0; i < len(l2); {
		next, k, err := im.runAt(l2[i:])
		if err != nil {
			return err
		}
		i += k
		switch {
		case next.n == 0:
		case r.n > 0 && next.first == r.first+hostCluster(r.n):
			r.n += next.n
		default:
			if r.n > 0 {
				if err := use(r); err != nil {
					return err
				}
			}
			r = next
		}
	}
	if r.n == 0 {
		return nil
	}
	return use(r)
}

// runAt returns the host clusters that the first entry of l2, and k-1 after it,
// refer to: data clusters one behind the other at once, else one entry's.
func (im *Image) runAt(l2 []uint64) (r run, k int, err error) {
	g := &im.geo
	e := l2Entry(l2[0])
	switch e.kind() {
	case kindNormal, kindZeroAllocated:
		if !g.aligned(e.offset()) {
			return r, 0, corruptf("L2 entry", e.offset(), "host offset is not aligned to a cluster")
		}
		next := uint64(e.offset()) + uint64(g.clusterSize)
		for k = 1; k < len(l2) && l2[k]&^(entryCopied|entryZero) == next; k++ {
			next += uint64(g.clusterSize)
		}
		return run{g.hostCluster(e.offset()), int64(k)}, k, nil
	case kindCompressed:
		off, n := e.compressedRange(g)
		first := g.hostCluster(off)
		return run{first, int64(g.hostCluster(off+HostOffset(n-1))-first) + 1}, 1, nil
	}
	return r, 1, nil
}
