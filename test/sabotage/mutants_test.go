//go:build sabotage

package sabotage

// A mutant is one broken rule.
type mutant struct {
	name string // the rule, and how it is broken
	file string // below the root of the repository
	old  string // text that occurs once in file
	new  string // what it becomes
	pkg  string // whose tests must notice
	run  string // which tests, as for go test -run
}

// Tests of the engine by what they look for.
const (
	powerLoss  = "TestPowerLoss"
	faults     = "TestFault|TestFullPool"
	model      = "TestModel$"
	concurrent = "TestConcurrent|TestSnapshotUnderWriters|TestGroup"
)

var mutants = []mutant{
	{
		name: "E1 E2: no sync between the classes of a pass",
		file: "cache/pass.go",
		old:  "		if c > 0 {\n			// The barrier",
		new:  "		if false {\n			// The barrier",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E1: the L2 entry is stored before the data is written",
		file: "qcow2/write.go",
		old:  "	if err := im.writeAround(p[:length], off, g.hostOffset(first), old[0], old[n-1], fresh); err != nil {",
		new:  "	im.storeL2(r, []l2Entry{makeL2(g.hostOffset(first), true, false)})\n	im.handle.WriteBack()\n	if err := im.writeAround(p[:length], off, g.hostOffset(first), old[0], old[n-1], fresh); err != nil {",
		pkg:  "qcow2", run: powerLoss + "|" + faults,
	},
	{
		name: "E1: copy on write forgets the tail",
		file: "qcow2/write.go",
		old:  "	if err := im.readOld(buf[head:head+tail], off+int64(len(p)), last, tailZero); err != nil {",
		new:  "	if err := im.readOld(buf[head:head+tail], off+int64(len(p)), last, true); err != nil {",
		pkg:  "qcow2", run: model,
	},
	{
		name: "E2: L2 tables are written before refcount blocks",
		file: "qcow2/class.go",
		old:  "	classRefblock tableClass = iota // refcount blocks\n	classReftable                   // the refcount table\n	classL2                         // L2 tables, active and of snapshots",
		new:  "	classL2 tableClass = iota\n	classReftable\n	classRefblock",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E3 E8: freed clusters do not wait for the pass",
		file: "qcow2/quarantine.go",
		old:  "im.handle.Done() < q.items[0].pass || ",
		new:  "",
		pkg:  "qcow2", run: "FreedCluster",
	},
	{
		name: "E3: clusters are freed at once",
		file: "qcow2/l2table.go",
		old:  "		im.release(g.hostCluster(e.offset()), 1, false)",
		new:  "		_ = im.reclaimRun(quarantined{run: run{g.hostCluster(e.offset()), 1}})",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E4: the cut leaves COPIED set",
		file: "qcow2/snapshot_create.go",
		old:  "			l1.entries[i].Store(e &^ entryCopied)",
		new:  "",
		pkg:  "qcow2", run: model + "|" + concurrent,
	},
	{
		name: "E4: a write does not sweep its table first",
		file: "qcow2/l2table.go",
		old:  "	if c := im.cut.Load(); c != nil && off != 0 {",
		new:  "	if c := im.cut.Load(); c != nil && off == 1 {",
		pkg:  "qcow2", run: concurrent,
	},
	{
		name: "E5 E6: new L1 and snapshot tables are not durable before the header names them",
		file: "qcow2/resize.go",
		old:  "	return first, im.handle.WriteBack()",
		new:  "	return first, nil",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E6: the new refcount table is not durable before the header names it",
		file: "qcow2/refgrow.go",
		old:  "	if err := im.handle.WriteBack(); err != nil {\n		return err\n	}\n	var field [12]byte",
		new:  "	var field [12]byte",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E7: snapshots do not set the dirty bit",
		file: "qcow2/headerio.go",
		old:  "	if im.version < 3 {\n		return nil // version 2 has no feature bits\n	}",
		new:  "	if bit == incompatDirty {\n		return nil\n	}",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "E8: freed clusters do not wait for requests under way",
		file: "qcow2/quarantine.go",
		old:  " || !im.epochs.passed(q.items[0].epoch) {",
		new:  " {",
		pkg:  "qcow2", run: "FreedCluster",
	},
	{
		name: "a header switch is not synced",
		file: "qcow2/headerio.go",
		old:  "	if err := im.f.Datasync(); err != nil {",
		new:  "	if err := error(nil); err != nil {",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "a flush does not sync at its end",
		file: "cache/pass.go",
		old:  "	if err == nil {\n		err = h.sync(0)\n	}",
		new:  "	if err == nil && len(h.items) > 0 {\n		err = h.sync(0)\n	}",
		pkg:  "qcow2", run: "TestFlushCost|" + powerLoss,
	},
	{
		name: "a flush does nothing",
		file: "qcow2/flush.go",
		old:  "	if err := im.handle.WriteBack(); err != nil {\n		return fmt.Errorf(\"qcow2: flush: %w\", err)",
		new:  "	if err := error(nil); err != nil {\n		return fmt.Errorf(\"qcow2: flush: %w\", err)",
		pkg:  "qcow2", run: powerLoss,
	},
	{
		name: "a store during a write back is lost",
		file: "cache/pass.go",
		old:  "!a.swapState(it.slot, it.copied, it.copied.as(kindClean))",
		new:  "!a.swapState(it.slot, a.state(it.slot), a.state(it.slot).as(kindClean))",
		pkg:  "cache", run: "",
	},
	{
		name: "a failed sync is swallowed",
		file: "cache/pass.go",
		old:  "		return fmt.Errorf(\"cache: sync: %w\", err)",
		new:  "		_ = err",
		pkg:  "qcow2", run: faults,
	},
	{
		name: "a failed write of a table is swallowed",
		file: "cache/pass.go",
		old:  "			return fmt.Errorf(\"cache: write table at %#x: %w\", off, err)",
		new:  "			_ = off",
		pkg:  "qcow2", run: faults,
	},
	{
		name: "a failed write of data is published",
		file: "qcow2/write.go",
		old:  "		im.free(first, n)\n		return 0, err\n	}\n	var entries",
		new:  "		_ = err\n	}\n	var entries",
		pkg:  "qcow2", run: faults,
	},
	{
		name: "reused clusters count as fresh",
		file: "qcow2/alloc.go",
		old:  "		if t.n > 0 {\n			return t, nil\n		}\n	}\n	return take{}, nil",
		new:  "		if t.n > 0 {\n			t.fresh = true\n			return t, nil\n		}\n	}\n	return take{}, nil",
		pkg:  "qcow2", run: model,
	},
	{
		name: "two writes of one new cluster do not wait for each other",
		file: "qcow2/claim.go",
		old:  "		other := s.overlap(first, n)\n",
		new:  "		other := s.overlap(first, 0)\n",
		pkg:  "qcow2", run: concurrent,
	},
	{
		name: "a snapshot does not count L2 tables",
		file: "qcow2/snapshot_create.go",
		old:  "		err = add(run{im.geo.hostCluster(off), 1})",
		new:  "		err = nil",
		pkg:  "qcow2", run: model,
	},
	{
		name: "punch comes after the cluster is free",
		file: "qcow2/quarantine.go",
		old:  "			_ = im.f.Punch(int64(g.hostOffset(item.first)), n*g.clusterSize)",
		new:  "			defer im.f.Punch(int64(g.hostOffset(item.first)), n*g.clusterSize)",
		pkg:  "qcow2", run: "FreedCluster",
	},
	{
		name: "a short write of the host is taken for a whole one",
		file: "cache/pass.go",
		old:  "		if err == nil && m < len(p) {",
		new:  "		if err == nil && m < 0 {",
		pkg:  "cache", run: "",
	},
	{
		name: "an arena of before a reboot is used",
		file: "cache/header.go",
		old:  "	if h.bootID != want.bootID {",
		new:  "	if false {",
		pkg:  "cache", run: "Arena",
	},
	{
		name: "an arena of another generation is used",
		file: "cache/header.go",
		old:  "	if h.generation != want.generation {",
		new:  "	if false {",
		pkg:  "cache", run: "Arena",
	},
	{
		name: "a damaged arena header is used",
		file: "cache/header.go",
		old:  "crc32.Checksum(b[:60], castagnoli); got != want {",
		new:  "crc32.Checksum(b[:60], castagnoli); got != want && false {",
		pkg:  "cache", run: "Arena",
	},
	{
		name: "two processes serve one arena",
		file: "cache/arena_file.go",
		old:  "	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {",
		new:  "	if err := error(nil); err != nil {",
		pkg:  "cache", run: "Arena",
	},
	{
		name: "a successor does not look for the tables of its image",
		file: "cmd/csi-qcow2/nbd_rundir.go",
		old:  "[16]byte(sum[:16]), previous != nil",
		new:  "[16]byte{sum[0] &^ sum[0]}, previous != nil",
		pkg:  "cmd/csi-qcow2", run: "TestNBDKilledUnderLoad",
	},
	{
		name: "an unclean end is not noticed",
		file: "qcow2/open.go",
		old:  "	if im.hdr.dirty() || im.opts.Unclean {",
		new:  "	if im.hdr.dirty() {",
		pkg:  "qcow2", run: "TestKilledAnywhere",
	},
	{
		name: "the tables of a predecessor are not written back before the repair",
		file: "qcow2/open.go",
		old:  "	if im.handle.DirtyTables() > 0 {",
		new:  "	if im.handle.DirtyTables() < 0 {",
		pkg:  "qcow2", run: "TestKilledAnywhere",
	},
	{
		name: "E9: a renamed file is not made durable in its directory",
		file: "internal/durable/dir.go",
		old:  "				if err := unix.Fsync(tfd); err != nil {\n					return err\n				}\n				return unix.Fsync(ffd)",
		new:  "				return nil",
		pkg:  "test/powerloss", run: "TestPoolOutlivesPowerLoss/ext4",
	},
	{
		name: "E9: a record is not made durable in its directory",
		file: "internal/durable/file.go",
		old:  "			return unix.Fsync(fd)\n		})\n	})\n}\n\nfunc writeSynced",
		new:  "			return nil\n		})\n	})\n}\n\nfunc writeSynced",
		pkg:  "test/powerloss", run: "TestPoolOutlivesPowerLoss/ext4",
	},
	{
		name: "a failure is forgotten with the process",
		file: "cache/pass.go",
		old:  "	h.markLocked(markFailed)\n",
		new:  "",
		pkg:  "qcow2", run: "TestFailureOutlivesTheProcess",
	},
	{
		name: "tables are written over what another tool wrote",
		file: "qcow2/takeover.go",
		old:  "return im.version < 3 || im.hdr.autoclear&autoclearStamp != 0",
		new:  "return true",
		pkg:  "qcow2", run: "TestForeignWriterIsNoticed",
	},
	{
		name: "tables that a failed image has lost are not missed",
		file: "cache/attic.go",
		old:  "		h.markLocked(markGone)\n",
		new:  "",
		pkg:  "qcow2", run: "TestTablesLostOfAFailedImage",
	},
	{
		name: "leaks beyond the end of the file stay",
		file: "qcow2/open.go",
		old:  ", beyondEnd: true",
		new:  "",
		pkg:  "qcow2", run: "TestLeakBeyondTheEnd",
	},
	{
		name: "an arena of an earlier attachment is used",
		file: "volume/image.go",
		old:  "		generation++\n",
		new:  "",
		pkg:  "volume", run: "TestStaleArenaIsNotUsed",
	},
	{
		name: "a restart makes a failed image a healthy one",
		file: "qcow2/takeover.go",
		old:  "		im.handle.Fail(errPredecessorFailed)\n",
		new:  "",
		pkg:  "volume", run: "TestFailureAfterKill",
	},
	{
		name: "FUA is answered before it is durable",
		file: "nbdexport/handle.go",
		old:  "	if err == nil && r.flags&flagFUA != 0 && r.modifies() {",
		new:  "	if false {",
		pkg:  "nbdexport", run: "FUA|Flush",
	},
}
