package qcow2

import (
	"cmp"
	"slices"
)

// A tableRange is where a structure that the header leads to lies.
type tableRange struct {
	name     string
	off, end HostOffset
}

// validateTables verifies that the tables that h leads to (active L1 table,
// refcount table, snapshot table and the L1 tables of the snapshots) exist,
// keep the limits and do not overlap one another or the header cluster.
// Writing one of them would else destroy another.
func validateTables(f File, h *header) error {
	g := h.geometry()
	if h.refcountTableClusters == 0 {
		return corruptf("refcount table", h.refcountTableOffset, "the header says that there is none; repair the image")
	}
	records, tableBytes, err := readSnapshotTableSize(f, h)
	if err != nil {
		return err
	}
	ranges := []tableRange{{name: "header", end: HostOffset(g.clusterSize)}}
	add := func(name string, off HostOffset, bytes int64) {
		if bytes > 0 {
			ranges = append(ranges, tableRange{name, off, off + HostOffset(g.roundUp(bytes))})
		}
	}
	add("L1 table", h.l1Offset, int64(h.l1Size)*entryBytes)
	add("refcount table", h.refcountTableOffset, int64(h.refcountTableClusters)*g.clusterSize)
	add("snapshot table", h.snapshotsOffset, tableBytes)
	for i := range records {
		r := &records[i]
		if err := r.validateL1(&g); err != nil {
			return err
		}
		add("snapshot L1 table", r.l1Offset, int64(r.l1Size)*entryBytes)
	}
	slices.SortStableFunc(ranges, func(a, b tableRange) int { return cmp.Compare(a.off, b.off) })
	for i := 1; i < len(ranges); i++ {
		if prev, r := ranges[i-1], ranges[i]; r.off < prev.end {
			return corruptf(r.name, r.off, "overlaps the %s at %#x", prev.name, uint64(prev.off))
		}
	}
	return nil
}

// validateL1 checks the place of the snapshot's L1 table, and the size of the disk it maps.
func (r *snapshotRecord) validateL1(g *geometry) error {
	switch {
	case !g.aligned(r.l1Offset) || r.l1Offset >= maxHostOffset:
		return corruptf("snapshot L1 table", r.l1Offset, "the offset in snapshot %q is not a multiple of the cluster size %d below 2^56", r.id, g.clusterSize)
	case int64(r.l1Size)*entryBytes > maxL1Bytes:
		return corruptf("snapshot L1 table", r.l1Offset, "%d entries in snapshot %q, more than %d", r.l1Size, r.id, maxL1Bytes/entryBytes)
	case r.diskSize > maxVirtualSize:
		return corruptf("snapshot L1 table", r.l1Offset, "the virtual size %d of snapshot %q is beyond the limit %d", r.diskSize, r.id, int64(maxVirtualSize))
	}
	return nil
}
