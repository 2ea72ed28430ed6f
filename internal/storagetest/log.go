package storagetest

import (
	"fmt"
	"strings"
)

// An Op is a kind of operation on a Disk. Values may be joined with | into a set.
type Op uint16

// The operations of a File.
const (
	OpRead Op = 1 << iota
	OpWrite
	OpWritev
	OpSync
	OpTruncate
	OpSize
	OpPunch
	OpAllocate
	OpClose
	opDrop // a failed sync that lost the dirty pages; logged only

	OpAny    = opDrop - 1
	OpWrites = OpWrite | OpWritev
	OpChange = OpWrites | OpSync | OpTruncate | OpPunch | OpAllocate
)

var opNames = []string{"read", "write", "writev", "sync", "truncate", "size", "punch", "allocate", "close", "drop"}

func (op Op) String() string {
	var names []string
	for i, name := range opNames {
		if op&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "|")
}

// An Event is an operation that changed a Disk.
type Event struct {
	Op   Op
	Off  int64
	N    int64  // length in bytes; the new size of a truncate
	Data []byte // what was written
}

func (e Event) String() string {
	switch e.Op {
	case OpSync, opDrop:
		return e.Op.String()
	case OpTruncate:
		return fmt.Sprintf("truncate to %d", e.N)
	}
	return fmt.Sprintf("%v %d bytes at %#x", e.Op, e.N, e.Off)
}

// apply makes the change of e to a file of size bytes and returns the new
// size. edit returns a page for changing; pages says which exist.
func (e Event) apply(size int64, pages map[int64]*page, edit func(int64) *page) int64 {
	switch e.Op {
	case OpWrite, OpWritev:
		for done := int64(0); done < e.N; {
			at := e.Off + done
			done += int64(copy(edit(at / PageSize).b[at%PageSize:], e.Data[done:]))
		}
		if e.N > 0 {
			size = max(size, e.Off+e.N)
		}
	case OpPunch:
		zero(e.Off, e.Off+e.N, pages, edit)
	case OpTruncate:
		if e.N < size {
			zero(e.N, size, pages, edit)
		}
		size = e.N
	case OpAllocate:
		size = max(size, e.Off+e.N)
	}
	return size
}

// zero clears [off, end) in the pages that exist.
func zero(off, end int64, pages map[int64]*page, edit func(int64) *page) {
	clearPage := func(i int64) {
		if pages[i] != nil {
			start := i * PageSize
			clear(edit(i).b[max(off-start, 0):min(end-start, PageSize)])
		}
	}
	if (end-off)/PageSize > int64(len(pages)) {
		for i := range pages {
			if i >= off/PageSize && i*PageSize < end {
				clearPage(i)
			}
		}
		return
	}
	for i := off / PageSize; i*PageSize < end; i++ {
		clearPage(i)
	}
}

// A Log is what happened to a Disk since Record.
type Log struct {
	base   map[int64]*page // frozen
	size   int64
	events []Event
}

// Record starts a new log from the current content, which counts as durable.
// A run that is only recorded needs memory for all that it writes.
func (d *Disk) Record() *Log {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.durable)
	d.durableSize = d.size
	d.log = &Log{base: d.freeze(), size: d.size}
	return d.log
}

// RecordTail is Record for a log that starts anew at every sync: enough for
// CrashClone, in bounded memory.
func (d *Disk) RecordTail() {
	d.Record()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tail = true
}

// startTail lets the log begin here, with everything durable. d.mu is held.
func (d *Disk) startTail() {
	d.log = &Log{base: d.freeze(), size: d.size}
}

// Position returns the number of events in the log of d: the crash point "now".
func (d *Disk) Position() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.log == nil {
		return 0
	}
	return len(d.log.events)
}

// Events returns the events of the log.
func (l *Log) Events() []Event { return l.events }
