package qcow2

// eachSlice calls visit with each slice of the L2 table at off: its place in the
// table, and its entries in a buffer that visit may change until it returns.
func (im *Image) eachSlice(off HostOffset, visit func(slice int64, l2 []uint64) error) error {
	g := &im.geo
	words := make([]uint64, g.sliceBytes/entryBytes)
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
	g := &im.geo
	var r run
	emit := func(first hostCluster, n int64) error {
		if r.n > 0 && first == r.first+hostCluster(r.n) {
			r.n += n
			return nil
		}
		last := r
		r = run{first, n}
		if last.n == 0 {
			return nil
		}
		return use(last)
	}
	for _, word := range l2 {
		e := l2Entry(word)
		var err error
		switch e.kind() {
		case kindNormal, kindZeroAllocated:
			if !g.aligned(e.offset()) {
				return corruptf("L2 entry", e.offset(), "host offset is not aligned to a cluster")
			}
			err = emit(g.hostCluster(e.offset()), 1)
		case kindCompressed:
			off, n := e.compressedRange(g)
			first := g.hostCluster(off)
			err = emit(first, int64(g.hostCluster(off+HostOffset(n-1))-first)+1)
		}
		if err != nil {
			return err
		}
	}
	if r.n == 0 {
		return nil
	}
	return use(r)
}
