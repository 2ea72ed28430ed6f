package qcow2

// CheckOptions say what Check does.
type CheckOptions struct {
	RepairLeaks bool // lower refcounts that are too high
	RepairAll   bool // also repair corruptions; implies RepairLeaks
	// Progress, if not nil, is called now and then with a fraction of 0 to 1.
	Progress func(done float64)
	// Report, if not nil, is called with each problem, in qemu-img's words.
	Report func(Problem)
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
