package qcow2

import (
	"context"
	"fmt"
	"math"
)

// CheckOptions say what Check does.
type CheckOptions struct {
	RepairLeaks bool // lower refcounts that are too high
	RepairAll   bool // also repair corruptions; implies RepairLeaks
	// Progress, if not nil, is called now and then with a fraction of 0 to 1.
	Progress func(done float64)
	// Report, if not nil, is called with each problem, in qemu-img's words.
	Report func(Problem)

	// beyondEnd also looks for leaks beyond the end of the file, which QEMU does
	// not: a power loss can leave a refcount and take the growth of the file
	// that it was for. They turn into leaks that QEMU sees when the file grows.
	beyondEnd bool
}

// A Problem is one finding of Check.
type Problem struct {
	Leak     bool // else a corruption
	Repaired bool
	Off      HostOffset // the structure or cluster that is wrong
	Msg      string     // as qemu-img check prints it
}

// A CheckResult counts what Check found, in qemu-img's terms.
type CheckResult struct {
	Corruptions, Leaks           int // left unrepaired
	CorruptionsFixed, LeaksFixed int
	CheckErrors                  int // parts that could not be checked
	ImageEndOffset               int64
	TotalClusters                int64 // of the virtual disk
	AllocatedClusters            int64
	FragmentedClusters           int64
	CompressedClusters           int64
}

// Clean reports whether nothing is wrong any more.
func (r CheckResult) Clean() bool { return r.Corruptions == 0 && r.Leaks == 0 && r.CheckErrors == 0 }

// A checker verifies one image, in the steps and words of `qemu-img check`:
//
//  1. read the snapshot table;
//  2. count the references to every host cluster: header, active L1 table and
//     what it maps, the same of each snapshot, snapshot table, bitmaps,
//     refcount table, refcount blocks;
//  3. compare the counts with the refcounts that the image stores;
//  4. compare the COPIED flags of the active tables with the stored refcounts.
//
// Beyond what qemu-img finds, a cluster is corrupt that is metadata and
// something else at once, even if its refcount allows for both: a write to one
// destroys the other.
//
// Step 2 remembers the COPIED flags too, so that step 4 needs a second look at
// the L2 tables only if a flag is wrong somewhere.
type checker struct {
	ctx context.Context
	f   File
	h   *header
	g   geometry
	o   CheckOptions
	res CheckResult

	shifts        []uint // where the refcounts of a word lie, in the order of their clusters
	fileBytes     int64
	fileClusters  hostCluster // clusters that the file has
	compareEnd    hostCluster // refcounts from here on are not compared
	reftable      []uint64    // entries of the refcount table
	snapshots     []snapshotRecord
	snapshotBytes int64    // of the snapshot table
	l1            []uint64 // entries of the active L1 table
	counts        *refCounts
	structure     []hostCluster        // clusters of the refcount table and blocks, as far as counted
	inStructure   bool                 // these are being counted
	zeroed        map[HostOffset]bool  // entries that the repair makes zero entries
	beyond        hostCluster          // the lowest cluster of a reference that goes beyond the end of the file
	highest       hostCluster          // the highest cluster with a reference or a refcount
	copiedWrong   bool                 // step 4 must look closely
	overlaps      bool                 // metadata is something else too
	sharedBlocks  map[hostCluster]bool // refcount blocks that are, and were reported
	structural    int                  // corruptions of the refcount structure
	tooLow        int                  // corruptions that are refcounts
	tooHigh       int                  // leaks
	unreadable    int                  // check errors that are refcounts
	rebuild       bool                 // as QEMU judges it: the refcounts cannot be relied on
	broken        bool                 // the refcount structure cannot be repaired in place
	dirtied       bool                 // the repair has set the dirty bit
	blocks        blockCache
}

// checkFile verifies the image in f, whose header is h, and repairs it as o
// says. Nothing else may write f meanwhile; nothing of it may be cached
// across a repair, which keeps h up to date.
//
// It returns an error only if the check could not be completed; what it found
// until then is in the result. Structural faults are no errors but counted.
func checkFile(ctx context.Context, f File, h *header, o CheckOptions) (CheckResult, error) {
	o.RepairLeaks = o.RepairLeaks || o.RepairAll
	c := &checker{ctx: ctx, f: f, h: h, g: h.geometry(), o: o}
	if err := c.run(); err != nil {
		c.res.CheckErrors++
		return c.res, err
	}
	return c.res, nil
}

func (c *checker) run() error {
	if err := c.load(); err != nil {
		return err
	}
	if err := c.countAll(); err != nil {
		return err
	}
	if err := c.compare(); err != nil {
		return err
	}
	var err error
	switch {
	case c.o.RepairLeaks:
		err = c.repair()
	case c.copiedWrong:
		err = c.checkCopied()
	}
	if err != nil {
		return err
	}
	if err := c.checkOverlaps(); err != nil {
		return err
	}
	if c.o.RepairLeaks {
		if err := c.finishRepair(); err != nil {
			return err
		}
	}
	c.res.ImageEndOffset = int64(c.g.hostOffset(c.highest + 1))
	c.progress(1)
	return nil
}

// load reads the tables that are held in memory: at most 32 MiB of L1 table, 8
// MiB of refcount table, and the snapshot table.
func (c *checker) load() (err error) {
	if c.fileBytes, err = c.f.Size(); err != nil {
		return err
	}
	c.fileClusters = hostCluster(c.g.clusters(c.fileBytes))
	c.res.TotalClusters = c.g.clusters(int64(c.h.size))
	c.counts = newRefCounts(&c.g)
	for i := range 64 / int(c.g.refcountBits) {
		_, shift := c.g.refcountWord(i)
		c.shifts = append(c.shifts, shift)
	}
	c.beyond = math.MaxUint64
	c.zeroed = map[HostOffset]bool{}
	c.sharedBlocks = map[hostCluster]bool{}
	c.blocks = blockCache{}
	if c.snapshots, err = c.loadSnapshots(); err != nil {
		return err
	}
	if c.reftable, err = c.readEntries(c.h.refcountTableOffset, int64(c.h.refcountTableClusters)<<(c.g.clusterBits-entryBits)); err != nil {
		return err
	}
	c.l1, err = c.readEntries(c.h.l1Offset, int64(c.h.l1Size))
	return err
}

// problem counts a finding that stays and reports it.
func (c *checker) problem(leak bool, off HostOffset, format string, args ...any) {
	if leak {
		c.res.Leaks++
	} else {
		c.res.Corruptions++
	}
	c.report(Problem{Leak: leak, Off: off}, format, args...)
}

// fixed counts a finding that is repaired and reports it.
func (c *checker) fixed(leak bool, off HostOffset, format string, args ...any) {
	if leak {
		c.res.LeaksFixed++
	} else {
		c.res.CorruptionsFixed++
	}
	c.report(Problem{Leak: leak, Off: off, Repaired: true}, format, args...)
}

// report formats only for who listens: a broken image can have a problem in every entry.
func (c *checker) report(p Problem, format string, args ...any) {
	if c.o.Report != nil {
		p.Msg = fmt.Sprintf(format, args...)
		c.o.Report(p)
	}
}

func (c *checker) progress(done float64) {
	if c.o.Progress != nil {
		c.o.Progress(done)
	}
}
